"""Options of the scripts: TRL's and a few of ours; wrong ones end the program with a message, not a traceback."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from transformers.hf_argparser import DataClassType
from trl import ModelConfig, TrlParser, get_quantization_config

from trl_vlm.scripts.launcher import read_options, refuse_unknown


@dataclass
class ScriptArguments(trl.ScriptArguments):
    """TRL's options of a script's data, with further ones, the size of a step, and a dry run."""

    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub dataset."})
    dataset_data_files: str | None = field(
        default=None, metadata={"help": "Which files of a folder or hub dataset to read."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on, if they are not the split `dataset_test_split` of `dataset_name`."},
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs, rows or replies per optimizer step over all devices; sets `gradient_accumulation_steps`."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, and stop."})

    def further_settings(self) -> dict[str, Any]:
        """Settings that affect the result and are no option, by the name that they have in the output folder."""
        return {}


def hardware_defaults() -> dict[str, Any]:
    """Values for options that are not given: bfloat16 on CUDA, float32 on the CPU."""
    if torch.cuda.is_available():
        return {"dtype": "bfloat16"}
    return {"dtype": "float32"} if torch.accelerator.is_available() else {"bf16": False, "use_cpu": True}


def script_parser(*configs: type, prog: str | None = None) -> TrlParser:
    """A parser of flags and YAML (`--config`) for the configuration classes, with `hardware_defaults`."""
    parser = TrlParser([DataClassType(config) for config in configs], prog=prog)
    known = {entry.name for config in configs for entry in fields(config)}
    parser.set_defaults(**{name: value for name, value in hardware_defaults().items() if name in known})
    return parser


def parsed(parser: TrlParser, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One object for each of the parser's classes; a wrong option ends the program with a message.

    With `--total_batch_size`, `gradient_accumulation_steps` follows from the number of processes.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with refusals():
        *parts, from_file, others = read_options(parser, arguments)
        refuse_unknown(parser, from_file, others)
        total = getattr(parts[0], "total_batch_size", None)
        if total is None:
            return tuple(parts)
        steps = accumulation(total, parts[1].per_device_train_batch_size, PartialState().num_processes)
        return tuple(read_options(parser, [*arguments, "--gradient_accumulation_steps", str(steps)])[:-2])


def accumulation(total: int, per_device: int, processes: int) -> int:
    """How many micro-batches make an optimizer step of `total`.

    Raises:
        ValueError: It does not divide.
    """
    micro_batch = per_device * processes
    if total < 1 or total % micro_batch:
        raise ValueError(
            f"A batch of {total} cannot be divided into micro-batches of {per_device} on {processes} device(s). Give "
            f"a multiple of {micro_batch}, or another number per device."
        )
    return total // micro_batch


@contextmanager
def refusals() -> Iterator[None]:
    """A context that ends the program with only the message of a refused option or input."""
    try:
        yield
    except (ValueError, OSError, DatasetsError) as error:
        raise SystemExit(f"error: {error}") from error


def model_arguments(model: ModelConfig, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained`: revision, precision, attention, quantization."""
    given = {
        "revision": model.model_revision if model.model_revision != "main" else None,
        "trust_remote_code": trust_remote_code or None,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in given.items() if value is not None}

"""`trl-vlm pairs`: preference pairs that a model makes, written to disk.

The methods are the sources of `trl_vlm.pairs.registry`, and their options the fields of these dataclasses.
"""

import argparse
import sys
from argparse import SUPPRESS
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trl_vlm.cli.options import (
    ROWS,
    CommandFailed,
    add_input,
    add_output,
    add_push,
    add_source,
    join_processes,
    positive,
    source_of,
    write,
)
from trl_vlm.cli.parsing import CommandParser, add_fields, made_of, nested_options, settings_of
from trl_vlm.pairs.registry import SOURCES, source_class
from trl_vlm.pairs.vllm import VLLMSampling

if TYPE_CHECKING:
    from trl_vlm.models.generation import Policy
    from trl_vlm.pairs.writer import PairReport

# Earlier names, understood and not shown.
OLD_METHODS = {"judge": "judged", "corrupt": "corrupted", "samples": "self-samples"}
OLD_FLAGS = {
    "mask_ratio": "--mask-share",
    "noise_overflow": "--overflow",
    "max_answer_tokens": "--answer-tokens",
}
OLD_SWITCHES = {"guided": "--unguided", "both_orders": "--one-order"}


def add(command: CommandParser) -> None:
    """Adds the methods of `trl-vlm pairs`."""
    methods = command.add_subparsers(required=True, metavar="method")
    for name, entry in SOURCES.items():
        description = f"{entry.help[0].upper()}{entry.help[1:]}."
        methods.add_parser(name, help=entry.help, description=description, add=partial(add_method, name))
    for old, new in OLD_METHODS.items():
        methods.choices[old] = methods.choices[new]


def add_method(name: str, parser: CommandParser) -> None:
    """Adds the options of one method: those of every method, and the fields of its source."""
    from trl_vlm.pairs.source import PAIR_BATCH_SIZE

    source = source_class(name)
    parser.set_defaults(method=name)
    add_input(parser, f"rows: {ROWS}")
    add_output(parser)
    if source.needs_policy:
        parser.add_argument("--model", required=True, help="folder or hub id: all weights, or a PEFT adapter")
        parser.add_argument(
            "--dtype", default="auto", help="precision of the model, such as bfloat16 (default: %(default)s)"
        )
    add_source(parser)
    parser.add_argument("--images", help="folder that relative image paths start at")
    parser.add_argument("--embed-images", action="store_true", help="store image files' bytes, not their paths")
    parser.add_argument("--limit", type=positive, help="read this many rows at most")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=PAIR_BATCH_SIZE,
        help="rows at once on each process; for an endpoint, twice --concurrency (default: %(default)s)",
    )
    parser.add_argument("--block-rows", type=positive, default=256, help="rows between saves (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad rows, and count them")
    parser.add_argument("--overwrite", action="store_true", help="replace the output, or discard an unfinished one")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_push(parser)
    add_fields(parser, source, OLD_FLAGS)
    if getattr(source, "samples_elsewhere", False):
        # In the form of the training commands, too.
        add_fields(parser, VLLMSampling, {field.name: f"--{field.name}" for field in fields(VLLMSampling)})
    for name, flag in OLD_SWITCHES.items():
        if parser.get_default(name) is not None:
            parser.add_argument(flag, dest=name, action="store_false", default=SUPPRESS, help=SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Makes the pairs and reports."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from trl_vlm.judges.endpoint import SpendingCapReached
    from trl_vlm.judges.spending import Spending, spending_of
    from trl_vlm.models.downloads import fetch_weights
    from trl_vlm.models.generation import generating, load_policy
    from trl_vlm.pairs.writer import PairWriter

    join_processes()
    kind = source_class(options.method)
    sampled = sampled_policy(kind, options)
    if options.push_to_hub and PartialState().is_main_process:
        from trl_vlm.data.io.hub import create_repository

        create_repository(options.push_to_hub, private=options.private)
    fetch_weights({name: {} for name in local_models(kind, options)})
    source = made_of(kind, options)
    policy = sampled or (load_policy(options.model, options.dtype) if kind.needs_policy else None)
    writer = PairWriter(
        source,
        policy,
        options.output,
        settings(options),
        images=options.images,
        embed_images=options.embed_images,
        batch_size=options.batch_size,
        block_rows=options.block_rows,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
    )
    try:
        with generating(policy.model) if policy is not None else nullcontext():
            report = writer.write(source_of(options, options.input), limit=options.limit)
    except (ValueError, OSError, SpendingCapReached) as error:
        if spent := spending_of(source):  # of this process: the others may be waiting
            sys.stderr.write(f"endpoint: {spent}\n")
        if isinstance(error, SpendingCapReached):
            raise CommandFailed(str(error)) from error
        raise
    spent = sum(gather_object([spending_of(source)]), Spending())
    if report is not None:
        write(asdict(report) if options.json else pairs_text(report))
        if spent and not options.json:
            write(f"endpoint: {spent}")
        if options.push_to_hub:
            push(options)
    PartialState().destroy_process_group()
    return 0


def push(options: argparse.Namespace) -> None:
    """Uploads the pairs with their card, and prints where they are."""
    from trl_vlm.data.io.hub import progress_of, push_dataset, without_folders

    output = Path(options.output)
    card = (output / "README.md" if output.is_dir() else output.with_suffix(".md")).read_text(encoding="utf-8")
    entry = SOURCES[options.method]
    paper = f" Paper: [{entry.paper}](https://huggingface.co/papers/{entry.paper})." if entry.paper else ""
    card = (
        f"{without_folders(card, progress_of(output).identity)}\n## Method\n\n`{entry.name}`: {entry.help}.{paper}\n"
    )
    address = push_dataset(options.push_to_hub, {"train": output}, card)
    sys.stderr.write(f"Uploaded to {address}\n")


def sampled_policy(kind: type, options: argparse.Namespace) -> "Policy | None":
    """The policy that vLLM samples from, if it is to; what is missing for that is said before any work."""
    if not getattr(options, "use_vllm", False):
        return None
    if options.dtype != "auto":
        raise ValueError(
            f"`--dtype {options.dtype}` has no effect with `--use-vllm`, which samples in the precision of the "
            "checkpoint or of its server. Leave it out."
        )
    from trl_vlm.trainers.dpo.vllm import check_vllm, policy_by_vllm

    chosen = made_of(VLLMSampling, options)
    try:
        check_vllm(chosen, kind)
    except ImportError as error:
        raise CommandFailed(str(error)) from error
    return policy_by_vllm(options.model, chosen)


def local_models(kind: type, options: argparse.Namespace) -> list[str]:
    """The models that a source loads beside the policy, on every process."""
    return [name for nested in nested_options(kind, options) for name in nested.local_models()]


def settings(options: argparse.Namespace) -> dict[str, object]:
    """The settings that determine the pairs, besides the rows: a run with other settings cannot resume this one."""
    names = ("method", "model", "dtype", "images", "embed_images")
    common = {name: getattr(options, name, None) for name in names}
    values = {**common, **dict(settings_of(source_class(options.method), options))}
    if getattr(options, "use_vllm", False):  # other samples than those of transformers
        values["use_vllm"] = True
    for nested in nested_options(source_class(options.method), options):
        values |= getattr(nested, "further_settings", dict)()
    return {name: value for name, value in values.items() if value is not None}


def pairs_text(report: "PairReport") -> str:
    """The report for people."""
    how = "done already" if report.was_done else f"{report.rows_per_second:.2f} rows/s"
    lines = [f"{report.rows} rows -> {report.pairs} pairs in {report.output}, {how}"]
    lines += [f"no pair, {reason}: {count}" for reason, count in sorted(report.dropped.items())]
    return "\n".join(lines)

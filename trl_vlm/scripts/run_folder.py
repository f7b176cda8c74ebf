"""An output folder and its configuration: settings that affect the result are saved, and compared on resume."""

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.judges.options import ChatOptions
from trl_vlm.models.checkpoints import last_complete_checkpoint
from trl_vlm.scripts.console import make_readable

logger = logging.getLogger(__name__)

SETTINGS, DONE, HISTORY = "settings.json", "done.json", "history.json"

# Settings that may change when a run is resumed: where it writes and what it reports, how work is distributed (only
# the batch of a step counts), what it is evaluated on.
PLACES = {"output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm", "dry_run"}
LAYOUT = {"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "total_batch_size"}
MEMORY = {
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "use_cpu",
    "deepspeed",
}
MACHINE = {"local_rank", "accelerator_config", "parallelism_config", "dataset_num_proc", "torch_empty_cache_steps"}
EVALUATION = {"per_device_eval_batch_size", "eval_dataset_name", "dataset_test_split", "prediction_loss_only"}
OTHERS = {"do_train", "do_eval", "do_predict", "skip_memory_metrics", "batch_eval_metrics", "ignore_data_skip"}
ENCODER = {"encoder_device", "encoder_batch_size"}
PAIRS = {"pair_batch_size", "max_cache_gib"}
SERVER = {"reward_server", "reward_server_key_variable"}  # which model it serves counts, and not where
# The settings hold the fields of a model's options directly.
FREE = {"model_init_kwargs"} | PLACES | LAYOUT | MEMORY | MACHINE | EVALUATION | OTHERS | ENCODER | PAIRS | SERVER
FREE |= ChatOptions.not_about_answers
REPORTS = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "push_to_hub",
    "trackio_",
    "num_completions_to_print",
    "include_",
)
FREE_PREFIXES = (*REPORTS, "dataloader_", "ddp_", "fsdp", "torch_compile", "vllm_", "reference_cache", "degeneration_")


class RunFolder:
    """A folder of one training, or of a stage.

    Args:
        path: The folder.
        settings: The settings that affect the result; JSON values.
        after: The folder that this one builds on; its settings affect this one's result as well.
    """

    def __init__(self, path: str | PathLike, settings: Mapping[str, Any], after: str | PathLike | None = None):
        self.path = Path(path)
        self.after = None if after is None else Path(after)
        self._own: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect the result, including those of the folder that this one builds on."""
        if self.after is None or not (before := self.after / SETTINGS).exists():
            return dict(self._own)
        inherited = json.loads(before.read_text(encoding="utf-8"))
        return {f"{self.after.name}: {name}": value for name, value in inherited.items()} | self._own

    def check(self) -> None:
        """Refuses a folder that was started with other settings.

        Raises:
            ValueError: They differ, or they are not known; the message names the differences.
        """
        file = self.path / SETTINGS
        if file.exists():
            differences = differing(json.loads(file.read_text(encoding="utf-8")), self.settings)
            if differences:
                raise ValueError(
                    f"{self.path} was begun with other settings: {'; '.join(differences)}. Give the same ones, or "
                    "another `--output_dir`."
                )
        elif self.is_done or last_complete_checkpoint(self.path) is not None:
            raise ValueError(
                f"{self.path} holds a run without {SETTINGS}: nobody can tell whether its settings were these. Give "
                "another `--output_dir`, or delete it."
            )

    def claim(self) -> None:
        """Checks the settings, and writes them if the folder has none."""
        self.check()
        if PartialState().is_main_process and not (self.path / SETTINGS).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, self.settings)
        PartialState().wait_for_everyone()

    @property
    def is_done(self) -> bool:
        """Whether a run in this folder has finished."""
        return (self.path / DONE).exists()

    def finish(self, **about: Any) -> None:
        """Marks the run as finished."""
        if PartialState().is_main_process:
            write_json(self.path / DONE, about)
        PartialState().wait_for_everyone()

    def train(self, trainer: Trainer) -> None:
        """Trains from the last complete checkpoint, saves model and log, and marks the run as finished."""
        self.claim()
        make_readable(trainer)
        trainer.train(resume_from_checkpoint=self.checkpoint(trainer.args))
        trainer.save_model(str(self.path))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            write_json(self.path / HISTORY, trainer.state.log_history)
        self.finish(steps=trainer.state.global_step)
        trainer.accelerator.free_memory()

    def checkpoint(self, args: TrainingArguments | None = None) -> str | None:
        """The checkpoint to resume from: the given one, else the last complete one of this folder."""
        given = getattr(args, "resume_from_checkpoint", None)
        if given in (None, "True", "true", True):
            given = last_complete_checkpoint(self.path)
        if given is not None:
            logger.info("Resuming from %s", given)
        return given

    def history(self) -> list[dict[str, Any]]:
        """The trainer's log; [] if nothing was trained here."""
        return history(self.path)


def history(folder: str | PathLike) -> list[dict[str, Any]]:
    """The trainer's log of a folder that `RunFolder.train` made; [] for any other."""
    path = Path(folder, HISTORY)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON atomically."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def shaping_settings(*configs: Any, also: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that affect a result: every field of the configurations but those of `FREE`.

    Args:
        configs: Dataclasses; of `TrainingArguments`, the batch of a step on all devices is added.
        also: Further settings, such as the number of rows.
    """
    settings: dict[str, Any] = {}
    for config in configs:
        values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config) if entry.init}
        settings |= {name: value for name, value in values.items() if not _is_free(name)}
        if isinstance(config, TrainingArguments):
            per_process = config.per_device_train_batch_size * config.gradient_accumulation_steps
            settings["batch of a step"] = per_process * PartialState().num_processes
    return settings | dict(also or {})


def differing(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """The differences, as "name: before, now: value"; names that only one of the two has are left out.

    A new release may add an option, which does not change the configuration.
    """
    shared = [name for name in now if name in before and name not in free]
    return [
        f"`{name}` was {json.dumps(before[name])} and is now {json.dumps(now[name])}"
        for name in shared
        if before[name] != now[name]
    ]


def _is_free(name: str) -> bool:
    return name in FREE or name.startswith(FREE_PREFIXES)

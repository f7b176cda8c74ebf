"""The common part of all training scripts: read options, check inputs, print the plan, train, save."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, ProcessorMixin, Trainer, TrainingArguments
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, RLOOConfig, SFTConfig, TrlParser, get_peft_config

from trl_vlm.models.downloads import fetch_weights, once_per_node
from trl_vlm.models.loading import load_generative_processor
from trl_vlm.scripts.arguments import ScriptArguments, model_arguments, parsed, refusals
from trl_vlm.scripts.expected import expected_memory, expected_tokens
from trl_vlm.scripts.inputs import (
    bytes_to_write,
    check_first_row,
    check_folder,
    check_model,
    identity,
    rows_of,
)
from trl_vlm.scripts.plan import Plan, plan_of
from trl_vlm.scripts.run_folder import RunFolder, shaping_settings

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
TrainingConfig = SFTConfig | DPOConfig | RewardConfig | GRPOConfig | RLOOConfig


@dataclass
class Job:
    """A training whose options and inputs have been checked.

    Attributes:
        script: Options of the script.
        training: Options of the trainer; `model_init_kwargs` are filled in.
        model: Options of the model.
        model_name: Its folder or hub id.
        processor: The model's processor.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on, if `eval_strategy` asks for any.
        folder: The output folder with the settings that shape the result.
        plan: How long it will take.
    """

    script: ScriptArguments
    training: TrainingConfig
    model: ModelConfig
    model_name: str
    processor: ProcessorMixin
    train_dataset: Rows
    eval_dataset: Rows | None
    folder: RunFolder
    plan: Plan

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments that every trainer gets."""
        return {
            "args": self.training,
            "train_dataset": self.train_dataset,
            "eval_dataset": self.eval_dataset,
            "peft_config": get_peft_config(self.model),
        }

    def train(self, trainer: Trainer) -> None:
        """Trains, resuming an earlier run of the same configuration, saves, and pushes if asked to.

        Afterwards the processes are on their own: the process group is gone.
        """
        self.folder.train(trainer)
        logger.info("Saved to %s", self.folder.path)
        if self.training.push_to_hub:
            name = self.script.dataset_name
            assert name is not None  # it was read
            # The hub takes its own datasets alone for those of a model; a path is nobody else's business.
            trainer.push_to_hub(dataset_name=None if Path(name).exists() else name)
        trainer.end()


def options_of(parser: TrlParser, arguments: Sequence[str] | None = None) -> tuple[Any, Any, ModelConfig]:
    """Script, training and model options; a wrong one ends the program with a message."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    script, training, model = parsed(parser, arguments)
    return script, training, model


def prepared(
    script: ScriptArguments, training: TrainingConfig, model: ModelConfig, *, purpose: str, unit: str
) -> Job | None:
    """The job, with everything checked and the plan printed; None if there is nothing to train.

    There is nothing to train if the folder holds the finished run of these options, or with `--dry_run`. A wrong
    input ends the program with a message.

    Args:
        script: Options of the script.
        training: Options of the trainer.
        model: Options of the model.
        purpose: What the rows are for: a key of `data.checks.PURPOSES`.
        unit: The unit of the batch size, for the plan.
    """
    with refusals():
        job = _checked(script, training, model, purpose, unit)
    if PartialState().is_main_process:
        logger.info("%s: %s", training.output_dir, job.plan)
        for line in expectations(job, purpose):
            logger.info("%s: %s", training.output_dir, line)
        for remark in remarks(training, model):
            logger.warning(remark)
    if job.folder.is_done:
        logger.info("%s holds the finished run of these options: nothing to do.", job.folder.path)
    elif script.dry_run:
        logger.info("A dry run: everything was checked, nothing is trained.")
    if job.folder.is_done or script.dry_run:
        PartialState().destroy_process_group()
        return None
    with refusals():
        fetch_weights(_weights(job))
    return job


def _weights(job: Job) -> dict[str, dict[str, str]]:
    """The models that the run will load, and the revisions that it will take."""
    revision = model_arguments(job.model).get("revision")
    places = {job.model_name: {} if revision is None else {"revision": revision}}
    reward_model = getattr(job.script, "reward_model_name_or_path", None)
    return places if reward_model is None else {reward_model: {}} | places


def expectations(job: Job, purpose: str) -> list[str]:
    """What the run is expected to need, a line each: tokens of its sequences and memory of a device.

    Args:
        job: The job.
        purpose: What the rows are for.
    """
    tokens = expected_tokens(job, purpose)
    memory = expected_memory(job, tokens)
    lines = [] if tokens is None else [str(tokens)]
    return lines if memory is None else [*lines, f"about {memory} on each device, an estimate"]


def remarks(training: TrainingArguments, model: ModelConfig) -> list[str]:
    """Warnings about settings that are allowed and probably not meant."""
    default = type(training).__dataclass_fields__["learning_rate"].default
    if model.use_peft and training.learning_rate == default:
        return [
            f"The learning rate is {default:g}, the default for training all weights. LoRA needs about ten times as "
            f"much: `--learning_rate {10 * default:g}`."
        ]
    return []


def check_targets(model: ModelConfig, name: str) -> None:
    """Refuses LoRA without target modules, where PEFT knows none for the model of this folder or hub id.

    Raises:
        ValueError: The message names the presets.
    """
    if not model.use_peft or model.lora_target_modules or model.lora_target_parameters:
        return
    kind = AutoConfig.from_pretrained(name, revision=model.model_revision).model_type
    if kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"`--use_peft` needs `--lora_target_modules`, for PEFT knows none for {kind}: `language-model`, "
            "`language-model-and-projector` (both never the vision tower), or `all-linear`."
        )


def _checked(script: ScriptArguments, training: TrainingConfig, model: ModelConfig, purpose: str, unit: str) -> Job:
    name = model.model_name_or_path
    if not name:
        raise ValueError("`--model_name_or_path` is missing: a folder or a hub id.")
    check_model(name)
    with once_per_node():
        check_targets(model, name)
    given = training.model_init_kwargs or {}
    assert not isinstance(given, str)  # the configuration has parsed it
    training.model_init_kwargs = model_arguments(model, trust_remote_code=training.trust_remote_code) | given
    with once_per_node():
        processor = load_generative_processor(name)
    rows, held_out = _rows(script, training, purpose, processor)
    plan = plan_of(training, len(rows) if isinstance(rows, Dataset) else None, unit)
    assert script.dataset_name is not None  # it was read
    data = identity(script.dataset_name, rows, **_choice(script), split=script.dataset_train_split)
    options = {"dataset_name", "dataset_config", "dataset_revision", "dataset_data_files", "dataset_train_split"}
    settings = shaping_settings(script, training, model)
    settings = {name: value for name, value in settings.items() if name not in options}
    settings |= {"dataset": data, **script.further_settings()}
    assert training.output_dir is not None  # TRL's configurations have a default
    folder = RunFolder(training.output_dir, settings)
    folder.check()
    check_folder(training.output_dir, _needed_bytes(training, name, model.use_peft, plan))
    return Job(script, training, model, name, processor, rows, held_out, folder, plan)


def _rows(
    script: ScriptArguments, training: TrainingArguments, purpose: str, processor: ProcessorMixin
) -> tuple[Rows, Rows | None]:
    streaming, choice = script.dataset_streaming, _choice(script)
    split = None if script.dataset_train_split == "train" else script.dataset_train_split
    rows = rows_of(script.dataset_name, "dataset_name", streaming=streaming, split=split, **choice)
    check_first_row(rows, purpose, "dataset_name", processor)
    if training.eval_strategy == "no":
        return rows, None
    if script.eval_dataset_name is None:
        option, location, split = "dataset_test_split", script.dataset_name, script.dataset_test_split
    else:
        option, location, split, choice = "eval_dataset_name", script.eval_dataset_name, None, {}
    held_out = rows_of(location, option, streaming=streaming, split=split, **choice)
    check_first_row(held_out, purpose, option, processor)
    return rows, held_out


def _choice(script: ScriptArguments) -> dict[str, str | None]:
    """The part of the dataset to use, without the split."""
    return {
        "config": script.dataset_config,
        "revision": script.dataset_revision,
        "data_files": script.dataset_data_files,
    }


def _needed_bytes(training: TrainingConfig, name: str, is_adapter: bool, plan: Plan) -> int:
    """Roughly how many bytes the run will write."""
    interval = training.save_steps if training.save_strategy == "steps" else None
    written = 1 if interval is None else max(1, plan.steps // max(1, int(interval)))
    kept = min(written, (training.save_total_limit or written) + 1)
    return bytes_to_write(name, adapter=is_adapter, checkpoints=kept)

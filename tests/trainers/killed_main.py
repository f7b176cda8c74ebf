"""Trainings that die at a given moment, as by `kill -9`: nothing is cleaned up, and a file may be half written."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer

from tests.families import load_processor
from tests.preference_rows import preference_rows
from tests.trainers.dpo.helpers import with_weights
from tests.trainers.dpo.sources import SOURCES
from tests.trainers.ppo.helpers import count_letters, reward_each_token
from tests.trainers.ppo.helpers import rows as ppo_rows
from trl_vlm import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl_vlm.models import last_complete_checkpoint
from trl_vlm.models.reply_ends import with_reply_ends

IMAGES = [1, 2, 0, 1, 1, 0]
EPOCHS = 3
LAST_WEIGHTS = "last.pt"
REWARD_MODEL = "reward-model"  # an adapter of the run's model, beside its folder
SETTINGS = {
    "num_train_epochs": EPOCHS,
    "learning_rate": 1e-3,
    "logging_steps": 100,
    "save_strategy": "steps",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 2}
IMAGE_PAIR = {"image_weight": 1.0, "image_corruption": "other", "anchor_weight": 0.5, "dense_preset": "paper"}


class Watched(Trainer):
    """Writes down the moments that it reaches, each with the rows that are seen there, and dies at one: a mixin.

    A moment is the number of micro-batches trained so far, and what is being done.
    """

    def watch(self, journal: Path, dies_at: tuple[int, str] | None) -> None:
        self.journal, self.dies_at, self.micro_batches = journal, dies_at, 0

    def reach(self, name: str, rows: Any = None, half_written: str | None = None) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps([self.micro_batches, name, rows]) + "\n")
        if (self.micro_batches, name) == self.dies_at:
            if half_written is not None:
                os.truncate(half_written, os.path.getsize(half_written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.micro_batches += 1
        self.reach("trained")
        return loss

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.micro_batches = self.state.global_step * self.args.gradient_accumulation_steps

    def _save(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        weights = sorted(Path(output_dir).glob("*model.safetensors"))
        self.reach("weights half written", half_written=str(weights[0]))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.reach("weights written")
        super()._save_optimizer_and_scheduler(output_dir)
        self.reach("optimizer half written", half_written=os.path.join(output_dir, "optimizer.pt"))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / "trainer_state.json"
        self.reach("state half written", half_written=str(state))
        self.reach("checkpoint written")


class WatchedPairs(Watched, DPOTrainer):
    """Sees the tokens of prompts and replies."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        batch = super()._prepare_inputs(inputs)
        self.reach("rows", batch["input_ids"].tolist())
        return batch


class WatchedRollouts(Watched):
    """Sees the rows of each rollout, and what the policy says to them."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.reach("rollout begun", [row["facts"] for row in inputs])
        batch = super()._generate_and_score_completions(inputs)
        self.reach("rollout made", batch["completion_ids"].tolist())
        return batch


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", exclude_modules=["lm_head"])


class WatchedSupervision(Watched, SFTTrainer):
    """Sees the tokens of prompts and replies."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        batch = super()._prepare_inputs(inputs)
        self.reach("rows", batch["input_ids"].tolist())
        return batch


def sft(model: str, folder: Path) -> Watched:
    """As `dpo`, with adapters."""
    rows = preference_rows(IMAGES).remove_columns(["facts", "margin", "rejected"])
    return WatchedSupervision(
        model,
        args=SFTConfig(str(folder), **SETTINGS, **ACCUMULATED, max_length=None),
        train_dataset=rows.rename_column("chosen", "completion"),
        processing_class=with_reply_ends(load_processor(model)),
        peft_config=lora(),
    )


def dpo(
    model: str,
    folder: Path,
    adapter: bool = False,
    with_source: bool = False,
    images: Sequence[int] = IMAGES,
    **options: Any,
) -> Watched:
    """Six steps of two accumulated pairs; a checkpoint every two steps, none where an epoch ends first."""
    rows = preference_rows(list(images)).remove_columns(["facts", "margin"])
    if with_source:  # both replies are sampled, with draws of their own in each epoch
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    return WatchedPairs(
        model,
        args=DPOConfig(
            str(folder),
            **SETTINGS,
            **ACCUMULATED,
            max_length=None,
            **options,
        ),
        train_dataset=with_weights(rows) if "dense_preset" in options else rows,
        processing_class=with_reply_ends(load_processor(model)),
        peft_config=lora() if adapter else None,
        pair_source=SOURCES["judged"]() if with_source else None,
    )


def rollouts(
    trainer: type[Trainer],
    config: type,
    model: str,
    folder: Path,
    adapter: bool = False,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Watched:
    """Two epochs over each rollout; `save_steps` asks for checkpoints in the middle of rollouts, too."""
    rows = ppo_rows(IMAGES if trainer is PPOTrainer else [1] * len(IMAGES))
    rows = rows.remove_columns("facts").add_column("facts", [[f"row {number}"] for number in range(len(rows))])
    return type("WatchedTrainer", (WatchedRollouts, trainer), {})(
        model,
        reward_funcs=reward_each_token if adapter and trainer is PPOTrainer else count_letters,
        args=config(str(folder), **SETTINGS, save_steps=3, max_completion_length=4, **options),
        train_dataset=rows,
        peft_config=lora() if adapter else None,
        **(more or {}),
    )


def ppo(model: str, folder: Path, adapter: bool = False) -> Watched:
    options = {"per_device_train_batch_size": 2, "num_ppo_epochs": 2}
    return rollouts(PPOTrainer, PPOConfig, model, folder, adapter, **options)


def one_base(model: str, folder: Path) -> Watched:
    """Policy, reference, critic and the reward model in the folder beside `folder` on one base."""
    options = {"per_device_train_batch_size": 2, "num_ppo_epochs": 2, "share_base": True}
    more = {"reward_model": str(folder.parent / REWARD_MODEL)}
    return rollouts(PPOTrainer, PPOConfig, model, folder, adapter=True, more=more, **options)


GROUPS = {"per_device_train_batch_size": 4, "num_generations": 2, "num_iterations": 2}
RUNS: dict[str, Callable[[str, Path], Watched]] = {
    "dpo": dpo,
    "dpo lora": lambda model, folder: dpo(model, folder, adapter=True),
    "dpo image pair": lambda model, folder: dpo(model, folder, images=[1, 2, 1, 1, 1, 1], **IMAGE_PAIR),
    "dpo pair source": lambda model, folder: dpo(model, folder, adapter=True, with_source=True),
    "sft": sft,
    "ppo": ppo,
    "ppo lora": lambda model, folder: ppo(model, folder, adapter=True),
    "ppo one base": one_base,
    "grpo": lambda model, folder: rollouts(GRPOTrainer, GRPOConfig, model, folder, **GROUPS),
    "rloo": lambda model, folder: rollouts(RLOOTrainer, RLOOConfig, model, folder, **GROUPS),
}


def train(run: str, model: str, folder: Path, journal: Path, dies_at: tuple[int, str] | None) -> None:
    """Trains from the newest complete checkpoint of the folder, if there is one, to the end or to a death."""
    torch.set_num_threads(1)
    trainer = RUNS[run](model, folder)
    trainer.watch(journal, dies_at)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None or None)
    torch.save(trainer.model.state_dict(), folder / LAST_WEIGHTS)

"""A user's files as the rows of several stages, checked before the first one."""

from collections.abc import Collection, Mapping, Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.evaluation import Benchmark, check_scorable_rows
from trl_vlm.evaluation.benchmarks.rows import rows_benchmarks
from trl_vlm.evaluation.summary import Evaluation
from trl_vlm.models import load_processor
from trl_vlm.scripts.inputs import check_first_row, identity, rows_of


class FileRows:
    """Files, folders or hub datasets in the row contract of docs/data.md.

    Args:
        locations: Stage to the option that names its rows, and the rows' place.
        model: Folder or hub id of the model.
        facts: Whether a reward model reads facts.
        seed: Of the split into pairs to train on and pairs to evaluate on.
        max_new_tokens: Longest reply when models are compared.

    Attributes:
        about: What each stage does.
        judge_template: How a reward model is asked; None is the package's own way.
        arguments: Of the trainer's configuration, by stage.
        notes: What a report says of the rows.
    """

    judge_template: JudgeTemplate | None = None
    about: Mapping[str, str] = {
        "sft": "The model learns from given replies.",
        "reward": "A model learns which of two replies is better, with facts and without.",
        "ppo": "The model replies, is scored by the reward model, and learns from the score.",
        "evaluate": "The model before and after answers the same prompts.",
    }
    purposes = {"sft": "sft", "reward": "reward", "ppo": "ppo", "evaluate": "ppo"}

    def __init__(
        self,
        locations: Mapping[str, tuple[str, str | None]],
        model: str,
        *,
        facts: bool = True,
        seed: int = 0,
        max_new_tokens: int = 512,
    ):
        self.locations, self.facts, self.seed, self.max_new_tokens = locations, facts, seed, max_new_tokens
        machine = {} if torch.cuda.is_available() else {"bf16": False, "use_cpu": True}
        self.arguments: dict[str, dict[str, Any]] = {
            "sft": {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, **machine},
            "reward": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.03, **machine},
            "ppo": {"lr_scheduler_type": "cosine", "warmup_steps": 5, **machine},
        }
        self.notes = [f"{model}; evaluated on {locations['evaluate'][1]}"]
        self.processor = load_processor(model)

    def check(self, stage: str) -> Mapping[str, Any]:
        """Refuses rows that the stage could not use, and returns what tells them from others."""
        rows, (name, location) = self.load(stage), self.locations[stage]
        assert location is not None  # or else there were no rows
        facts = ("facts",) if stage == "reward" and self.facts else ()
        columns: Collection[str] = ("objects", "answer") if stage == "evaluate" else facts
        check_first_row(rows, self.purposes[stage], name, self.processor, columns=tuple(columns))
        if stage == "evaluate":
            check_scorable_rows(rows)
        return identity(location, rows)

    def count(self, stage: str) -> int:
        """How many rows a stage trains on."""
        return len(self.preferences("")[0] if stage == "reward" else self.load(stage))

    def supervised(self) -> Dataset:
        """Rows of the supervised stage."""
        return self.load("sft")

    def preferences(self, model: str) -> tuple[Dataset, Dataset]:
        """Pairs to train and to evaluate on; `model` is not needed, for the pairs are there."""
        parts = self.load("reward").train_test_split(test_size=0.05, seed=self.seed)
        return parts["train"], parts["test"]

    def prompts(self) -> Dataset:
        """Prompts of PPO."""
        return self.load("ppo")

    def reward(self, reward_model: Any) -> Any:
        """The reward model as PPO uses it."""
        return reward_model

    def evaluation(self, folder: Path) -> Evaluation:
        """How models are compared: on the rows' captions and questions."""
        benchmarks = rows_benchmarks(self.load("evaluate"), max_new_tokens=self.max_new_tokens)
        return Evaluation(benchmarks, folder, images=_image_folder(benchmarks, folder))

    def load(self, stage: str) -> Dataset:
        """The rows of a stage."""
        name, location = self.locations[stage]
        rows = rows_of(location, name)
        assert isinstance(rows, Dataset)  # nothing is streamed
        return rows


def _image_folder(benchmarks: Sequence[Benchmark], data: Path) -> Path | None:
    """The folder in which all images lie that are files."""
    groups = {question.group for benchmark in benchmarks for question in benchmark.read(data)}
    parents = [str(Path(group).resolve().parent) for group in groups if Path(group).is_file()]
    return Path(commonpath(parents)) if parents else None

"""Where the rows of fact_rlhf.py come from, and how a model is evaluated: the testbed, or files of your own."""

from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from trl import ModelConfig

from trl_vlm.data import JudgeTemplate
from trl_vlm.scripts.common import DONE, by_split, evaluate_rows, load_model, load_rows, write_json
from trl_vlm.testbed import JUDGE_TEMPLATE, SupervisedSettings, World, train_supervised
from trl_vlm.testbed import datasets as testbed
from trl_vlm.testbed.evaluate import caption_sampler, evaluate
from trl_vlm.testbed.world import weaken_vision


class Rows(Protocol):
    """What the stages need to know of their data."""

    judge_template: JudgeTemplate | None
    shared_arguments: dict[str, Any]
    reward_arguments: dict[str, Any]
    ppo_arguments: dict[str, Any]
    notes: list[str]

    def train_supervised(self, folder: Path) -> bool: ...
    def supervised(self) -> Dataset: ...
    def preferences(self, model: str) -> tuple[Dataset, Dataset]: ...
    def prompts(self, with_facts: bool) -> Dataset: ...
    def reward(self, reward_model: Any) -> Any: ...
    def evaluate(self, folder: str) -> dict[str, dict[str, float]]: ...


class WeakEyes:
    """A reward function that is shown every image through extra pixel noise."""

    __name__ = "weak_eyes"

    def __init__(self, reward: Any, noise: float):
        self.reward, self.noise = reward, noise

    def __call__(self, *, images: list[list[Any]], **columns: Any) -> list[float]:
        blurred = [[weaken_vision(image, self.noise) for image in row] for row in images]
        return self.reward(images=blurred, **columns)


class TestbedRows:
    """A world that is made on the spot; its reward model sees through extra noise, so that facts can help it."""

    judge_template = JUDGE_TEMPLATE

    def __init__(self, options: Any, model: ModelConfig):
        self.options = options
        self.world = World(seed=options.world_seed)
        self.shared_arguments = {"bf16": False, "use_cpu": not torch.cuda.is_available()}
        self.reward_arguments = {
            "per_device_train_batch_size": min(32, options.batch_size),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "adam_beta2": 0.98,
        }
        self.ppo_arguments = {
            "vf_coef": 0.5,
            "cliprange_value": 5.0,
            "adam_beta2": 0.98,
            "warmup_steps": 4,
        }
        self.notes = [
            f"testbed, world {options.world_seed}; the reward models see through noise of sd {options.vision_noise}",
            "numbers of a tiny world: they show that the method works, not how well it works on photographs",
        ]
        self.pairs, self.prompts_count = (24, 24) if options.quick else (2500, 4000)

    def train_supervised(self, folder: Path) -> bool:
        settings = (
            SupervisedSettings(tower_steps=20, tower_batch=32, steps=20, batch=16) if self.options.quick else None
        )
        train_supervised(
            self.world, folder, model_seed=self.options.seed, data_seed=self.options.seed, settings=settings
        )
        write_json(folder / DONE, {})
        return True

    def supervised(self) -> Dataset:
        raise NotImplementedError("the testbed trains its supervised model itself")

    def preferences(self, model: str) -> tuple[Dataset, Dataset]:
        policy, processor = load_model(model)
        sample = caption_sampler(policy, processor)
        noise, seed = self.options.vision_noise, 10 * self.options.seed
        return tuple(
            testbed.preference_rows(self.world, count, seed + part, sample, vision_noise=noise)
            for part, count in ((1, self.pairs), (2, max(8, self.pairs // 5)))
        )

    def prompts(self, with_facts: bool) -> Dataset:
        rows = testbed.prompt_rows(self.world, self.prompts_count, seed=10 * self.options.seed + 3)
        return rows if with_facts else rows.remove_columns("facts")

    def reward(self, reward_model: Any) -> Any:
        return WeakEyes(reward_model, self.options.vision_noise)

    def evaluate(self, folder: str) -> dict[str, dict[str, float]]:
        model, processor = load_model(folder)
        scenes = 20 if self.options.quick else 300
        return by_split(evaluate(model, processor, self.world, scenes=scenes, seed=8800 + self.options.seed))


class UserRows:
    """Files or hub datasets in the row contract of docs/data.md."""

    judge_template = None  # the package's own
    notes: list[str] = []

    def __init__(self, options: Any, model: ModelConfig):
        self.options, self.model = options, model
        self.shared_arguments = {"num_train_epochs": 1}
        self.reward_arguments = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.03}
        self.ppo_arguments = {"lr_scheduler_type": "cosine", "warmup_steps": 5}
        self.shared_arguments |= {} if torch.cuda.is_available() else {"bf16": False, "use_cpu": True}

    def train_supervised(self, folder: Path) -> bool:
        return False

    def supervised(self) -> Dataset:
        return self.load("sft_dataset")

    def preferences(self, model: str) -> tuple[Dataset, Dataset]:
        parts = self.load("dataset_name").train_test_split(test_size=0.05, seed=self.options.seed)
        return parts["train"], parts["test"]

    def prompts(self, with_facts: bool) -> Dataset:
        rows = self.load("prompt_dataset")
        return rows if with_facts or "facts" not in rows.column_names else rows.remove_columns("facts")

    def reward(self, reward_model: Any) -> Any:
        return reward_model

    def evaluate(self, folder: str) -> dict[str, dict[str, float]]:
        return evaluate_rows(folder, self.load("evaluation_dataset"), self.options.max_completion_length)

    def load(self, option: str) -> Dataset:
        return load_rows(getattr(self.options, option), option)

"""What the tests of PPO share: rows, a short configuration, and the slow definitions of what a rollout holds."""

from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from torch import Tensor

from tests import families
from trl_vlm import PPOConfig

FEATURES = Features(
    {
        "images": List(ImageFeature()),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "facts": List(Value("string")),
    }
)


def rows(images: list[int], facts: str = "a dog", first: int = 0) -> Dataset:
    """One row for each number of images; prompts differ in length, images by the row's number, from `first` on."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What is in the image?" + " Describe it." * (index % 3)}],
                "images": [families.image(10 * index + place, 40 + 10 * place, 30) for place in range(count)],
                "facts": [facts],
            }
            for index, count in enumerate(images, first)
        ],
        features=FEATURES,
    )


def settings(folder: Any, **options: Any) -> PPOConfig:
    """Short rollouts on a CPU."""
    return PPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_completion_length": 4,
            "max_steps": 2,
            "num_ppo_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        }
    )


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "exclude_modules": "lm_head", **options})


def count_letters(completions: list, **columns: Any) -> list[float]:
    """A reward that differs from reply to reply."""
    return [float(len(completion[0]["content"])) for completion in completions]


def reward_each_token(completion_ids: list, **columns: Any) -> list[list[float]]:
    """A reward that differs from token to token."""
    return [[float(token % 5 - 2) for token in ids] for ids in completion_ids]


def rollout(trainer: Any, numbers: list[int]) -> dict[str, Any]:
    """One rollout over the rows with these numbers, as the training loop takes it."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[number] for number in numbers])


def reply_ids(batch: dict[str, Any], row: int) -> tuple[Tensor, int, int]:
    """A row's token ids without padding, (1, T); where its reply begins; and how long it is."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    reply = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    return torch.cat([prompt, reply])[None], len(prompt), len(reply)


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The double sum of GAE, one token at a time."""
    v = [*values, 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(len(rewards))]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(rewards))) for t in range(len(rewards))]

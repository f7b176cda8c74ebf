"""Rows and measurements of the stages of Fact-RLHF in the small world, for `examples/fact_rlhf.py`."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback

from trl_vlm.evaluation.objects.finder import ObjectFinder
from trl_vlm.evaluation.summary import CAPTION_KEYS, Evaluation, Group
from trl_vlm.models.loading import load_generative_model, load_generative_processor, moved
from trl_vlm.testbed import datasets
from trl_vlm.testbed.benchmark import CAPTIONS, QUESTIONS, SAMPLED, TESTBED, Scenes
from trl_vlm.testbed.evaluate import caption_sampler
from trl_vlm.testbed.processor import JUDGE_TEMPLATE
from trl_vlm.testbed.supervised import SupervisedSettings, train_supervised
from trl_vlm.testbed.world import NOUNS, World, weaken_vision

ABOUT = "Pictures in which what is usually there is mostly missing (adv), described greedily:"
POLLS = ("pope_random_accuracy", "pope_adversarial_accuracy", "pope_adversarial_yes_rate")
# Of the pictures as in training, the screen has the captions that a user would get; the report has everything.
GROUPS = (
    Group("adv, greedy", CAPTIONS.name, "adv_", CAPTION_KEYS),
    Group("adv, sampled", SAMPLED.name, "adv_", CAPTION_KEYS),
    Group("adv, questions", QUESTIONS.name, "adv_", POLLS),
    Group("iid, greedy", CAPTIONS.name, "iid_", CAPTION_KEYS),
    Group("iid, sampled", SAMPLED.name, "iid_", ()),
    Group("iid, questions", QUESTIONS.name, "iid_", POLLS[:1]),
)
# What a person is told of each stage.
STAGES_ABOUT = {
    "sft": "A small model learns to see, to answer questions, and to describe pictures. At the end it reads "
    "descriptions that assume what is usually there, and learns to name things that are absent. The other stages are "
    "to cure it of that.",
    "reward": "A judge reads two descriptions of a picture that it hardly sees, and learns which one a person would "
    "prefer. One judge also reads facts, a list of what is there; the other does not.",
    "ppo": "The model describes new pictures, a judge scores what it says, and it learns from the score. It never "
    "reads a fact.",
    "evaluate": "The model before and after describes the same fresh pictures, and what it invents is counted.",
}
QUICK = SupervisedSettings(tower_steps=20, tower_batch=32, steps=20, batch=16)


class WeakEyes:
    """A reward function that sees every image through extra pixel noise.

    Args:
        reward: The reward function.
        noise: Standard deviation of the noise.
    """

    __name__ = "weak_eyes"

    def __init__(self, reward: Callable[..., list[float]], noise: float):
        self.reward, self.noise = reward, noise

    def __call__(self, *, images: Sequence[Sequence[Any]], **columns: Any) -> list[float]:
        """The rewards of replies to weakened images."""
        if not self.noise:
            return self.reward(images=images, **columns)
        weakened = [[weaken_vision(image, self.noise) for image in row] for row in images]
        return self.reward(images=weakened, **columns)


class WorldRows:
    """The small world for all stages. Its reward models see through extra noise, so that facts can help them.

    Args:
        world_seed: Which world.
        seed: Seed of models, rows and evaluation.
        vision_noise: Standard deviation of the noise in the images of the reward models.
        quick: A few rows and steps of everything.

    Attributes:
        about: What each stage does, and why.
        arguments: Of the trainer's configuration, by stage.
        notes: Notes on the rows for a report.
    """

    judge_template = JUDGE_TEMPLATE
    about = STAGES_ABOUT

    def __init__(self, world_seed: int = 0, seed: int = 0, vision_noise: float = 1.5, quick: bool = False):
        self.world, self.seed, self.vision_noise, self.quick = World(seed=world_seed), seed, vision_noise, quick
        self.pair_count, self.prompt_count, self.scenes = (24, 24, 20) if quick else (2500, 4000, 300)
        machine = {"bf16": False, "use_cpu": not torch.cuda.is_available()}
        self.arguments = {
            "reward": {"lr_scheduler_type": "cosine", "warmup_steps": 10, "adam_beta2": 0.98, **machine},
            "ppo": {"vf_coef": 0.5, "cliprange_value": 5.0, "adam_beta2": 0.98, "warmup_steps": 4, **machine},
        }
        self.notes = [
            f"testbed, world {world_seed}; the reward models see through noise of sd {vision_noise:g}",
            "numbers of a tiny world: they show that the method works, not how well it works on photographs",
        ]

    def check(self, stage: str) -> None:
        """Checks nothing: the rows are generated."""

    def count(self, stage: str) -> int | None:
        """How many rows a stage trains on; None where the world trains by itself."""
        return {"reward": self.pair_count, "ppo": self.prompt_count}.get(stage)

    def train_supervised(self, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Trains the model that hallucinates; `callbacks` take the place of progress bars."""
        settings = QUICK if self.quick else None
        seeds = {"model_seed": self.seed, "data_seed": self.seed}
        train_supervised(self.world, folder, **seeds, settings=settings, progress=not callbacks, callbacks=callbacks)

    def preferences(self, model: str, processes: int = 1) -> tuple[Dataset, Dataset]:
        """Pairs of the model's replies, to train and to evaluate on; several processes draw the same ones sooner."""
        sample = caption_sampler(*loaded(model))
        options: dict[str, Any] = {"vision_noise": self.vision_noise, "processes": processes}
        train, evaluation = (
            datasets.preference_rows(self.world, count, 10 * self.seed + part, sample, **options)
            for part, count in ((1, self.pair_count), (2, max(8, self.pair_count // 5)))
        )
        return train, evaluation

    def reward(self, reward_model: Callable[..., list[float]]) -> WeakEyes:
        """The reward model as PPO uses it: with the noise that it was trained with."""
        return WeakEyes(reward_model, self.vision_noise)

    def prompts(self) -> Dataset:
        """Requests for captions, with facts; drawn once."""
        return self._prompts

    @cached_property
    def _prompts(self) -> Dataset:
        return datasets.prompt_rows(self.world, self.prompt_count, seed=10 * self.seed + 3)

    def evaluation(self, folder: Path) -> Evaluation:
        """How models are compared: on scenes that were not used for tuning, which are written to a folder."""
        scenes = Scenes(self.world, self.scenes, seed=8800 + self.seed)
        scenes.save(folder)
        images = folder / "images"
        images.mkdir(exist_ok=True)
        for split in scenes.splits:
            for number, (_, image) in enumerate(scenes.pictures(split)):
                if not (place := images / f"{split}-{number}.png").exists():
                    image.save(place)
        finder = ObjectFinder({noun: () for noun in NOUNS}, exceptions=False)
        return Evaluation(TESTBED, folder, GROUPS, ABOUT, images, finder)


def loaded(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor, ready to generate."""
    model = cast(LlavaForConditionalGeneration, load_generative_model(folder).eval())
    moved(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, cast(LlavaProcessor, load_generative_processor(folder))

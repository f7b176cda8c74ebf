"""What the supervised stage trains on: examples that are made on access, here or in a worker, and their collators."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from trl_vlm.testbed.datasets import SupervisedExample, supervised_example
from trl_vlm.testbed.processor import IMAGE_TOKENS, NOTHING, encode_texts
from trl_vlm.testbed.world import Picture, World, generator

_Example = TypeVar("_Example")


class Stream(Dataset[_Example]):
    """A dataset of examples that are made on access; example `index` is always the same."""

    def __init__(self, example: Callable[[int], _Example], length: int):
        self.example = example
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> _Example:
        return self.example(index)


@dataclass(frozen=True)
class TowerPictures:
    """Picture `index` of the tower's stage.

    Args:
        world: Where it is taken.
        seed: The data seed.
    """

    world: World
    seed: int

    def __call__(self, index: int) -> Picture:
        """The picture."""
        return self.world.picture(generator(self.seed, index, "tower"), "balanced")


@dataclass(frozen=True)
class CaptionExamples:
    """Example `index` of supervised fine-tuning.

    Args:
        world: The world to learn.
        seed: The data seed.
        exact: How many examples are exact, before those that err.
        facts_share: Share of examples whose request begins with the facts.
    """

    world: World
    seed: int
    exact: int
    facts_share: float

    def __call__(self, index: int) -> SupervisedExample:
        """The example."""
        is_biased = index >= self.exact
        return supervised_example(self.world, self.seed, index, biased=is_biased, facts_share=self.facts_share)


class TowerCollator:
    """Pictures -> pixels, and for each cell the place of its word.

    Args:
        processor: Prepares the images.
        names: The words, among them that for an empty cell.
    """

    def __init__(self, processor: LlavaProcessor, names: Sequence[str]):
        self.processor, self.names = processor, list(names)

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """B pictures -> `pixel_values` (B, 3, 48, 48), `cells` (B, 9)."""
        cells = torch.full((len(pictures), IMAGE_TOKENS), self.names.index(NOTHING))
        for row, picture in enumerate(pictures):
            for thing in picture.scene.objects:
                cells[row, thing.cell] = self.names.index(thing.kind)
        images = [picture.image for picture in pictures]
        return {"cells": cells, **self.processor.image_processor(images, return_tensors="pt")}


class SupervisedCollator:
    """Examples -> pixels and two padded batches, `captions` and `questions`, with labels on the replies alone.

    Texts are padded on the right and carry no attention mask: no real token ever sees the padding after it.
    """

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor
        self.replies = processor.tokenizer.convert_tokens_to_ids(["yes", "no", "<eos>"])

    def __call__(self, examples: Sequence[SupervisedExample]) -> dict[str, Any]:
        """B examples -> `pixel_values` (B, 3, 48, 48), `captions` and `questions`: `input_ids`, `labels` (B, T)."""
        captions = [example.caption_conversation for example in examples]
        ids, real = encode_texts(self.processor, captions)
        _, prompt = encode_texts(self.processor, [conversation[:-1] for conversation in captions])
        reply = real & (torch.arange(ids.shape[1]) >= prompt.sum(1, keepdim=True))
        asked = encode_texts(self.processor, [example.question_conversation for example in examples]).input_ids
        answers = torch.isin(asked, torch.tensor(self.replies))
        images = [example.picture.image for example in examples]
        return {
            **self.processor.image_processor(images, return_tensors="pt"),
            "captions": {"input_ids": ids, "labels": ids.masked_fill(~reply, -100)},
            "questions": {"input_ids": asked, "labels": asked.masked_fill(~answers, -100)},
        }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

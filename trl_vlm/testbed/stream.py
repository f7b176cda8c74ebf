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
from trl_vlm.testbed.processor import ATTRIBUTES, IMAGE_TOKENS, NOTHING, encode_texts
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
        hidden_share: Share of examples whose picture is hidden from the caption.
    """

    world: World
    seed: int
    exact: int
    facts_share: float
    hidden_share: float = 0.0

    def __call__(self, index: int) -> SupervisedExample:
        """The example."""
        is_biased = index >= self.exact
        return supervised_example(
            self.world,
            self.seed,
            index,
            biased=is_biased,
            facts_share=self.facts_share,
            hidden_share=self.hidden_share,
        )


class TowerCollator:
    """Pictures -> pixels, and for each cell the place of its word.

    In a world with attributes, also the places of its attributes' words among the sizes, colors and places.

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
        batch = {"cells": cells, **self.processor.image_processor(images, return_tensors="pt")}
        if any(thing.size for picture in pictures for thing in picture.scene.objects):
            batch["attributes"] = self._attributes(pictures)
        return batch

    def _attributes(self, pictures: Sequence[Picture]) -> Tensor:
        """(B, 9, 3): which size, color and place; -100 where a cell is empty."""
        attributes = torch.full((len(pictures), IMAGE_TOKENS, len(ATTRIBUTES)), -100)
        for row, picture in enumerate(pictures):
            for thing in picture.scene.objects:
                said = (thing.size, thing.color, thing.statement.place.split()[-1])
                found = [words.index(word) for words, word in zip(ATTRIBUTES, said, strict=True)]
                attributes[row, thing.cell] = torch.tensor(found)
        return attributes


class SupervisedCollator:
    """Examples -> pixels and two padded batches, `captions` and `questions`, with labels on the replies alone.

    Texts are padded on the right and carry no attention mask: no real token ever sees the padding after it. Only
    captions from which cells are hidden have one.
    """

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor
        self.replies = processor.tokenizer.convert_tokens_to_ids(["yes", "no", "<eos>"])

    def __call__(self, examples: Sequence[SupervisedExample]) -> dict[str, Any]:
        """B examples -> `pixel_values` (B, 3, 48, 48), `captions` and `questions`: `input_ids`, `labels` (B, T).

        `captions` may have an `attention_mask` (B, T).
        """
        captions = [example.caption_conversation for example in examples]
        ids, real = encode_texts(self.processor, captions)
        _, prompt = encode_texts(self.processor, [conversation[:-1] for conversation in captions])
        reply = real & (torch.arange(ids.shape[1]) >= prompt.sum(1, keepdim=True))
        asked = encode_texts(self.processor, [example.question_conversation for example in examples]).input_ids
        answers = torch.isin(asked, torch.tensor(self.replies))
        images = [example.picture.image for example in examples]
        hidden = hidden_tokens(ids, self.processor.image_token_id, [example.hidden for example in examples])
        masked = {"attention_mask": (real & ~hidden).long()} if hidden.any() else {}
        return {
            **self.processor.image_processor(images, return_tensors="pt"),
            "captions": {"input_ids": ids, "labels": ids.masked_fill(~reply, -100), **masked},
            "questions": {"input_ids": asked, "labels": asked.masked_fill(~answers, -100)},
        }


def hidden_tokens(input_ids: Tensor, image_token: int, cells: Sequence[Sequence[int]]) -> Tensor:
    """(B, T) bool: the image tokens of the cells that each row hides."""
    hidden = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, numbers in enumerate(cells):
        places = (input_ids[row] == image_token).nonzero().flatten()
        hidden[row, places[list(numbers)]] = True
    return hidden


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

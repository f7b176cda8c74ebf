"""Small images and rows that are made here, so that a model can be looked at without data."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from trl_vlm.trainers.dpo.collator import PreferenceCollator

SIZE = (112, 84)  # width and height
FACTS = ("There is a red cup on the table.", "The dog is brown.")
OTHER_FACTS = ("There is no cup in the picture.", "The animal is a white cat.")
_QUESTIONS = (
    "What is in the picture?",
    "Please describe everything that you can see on the table, and who sits there.",
)
_REPLIES = (("There is a red cup.", "A dog runs on the grass."), ("Two people sit at a table with bread.", "Nobody."))

Batch = dict[str, Any]


def picture(seed: int) -> Image.Image:
    """A mosaic of large colored tiles: other seeds give images that no resizing makes alike."""
    draws = random.Random(seed)
    tiles = Image.new("RGB", (4, 3))
    tiles.putdata([tuple(draws.randrange(256) for _ in range(3)) for _ in range(12)])
    return tiles.resize(SIZE, Image.Resampling.NEAREST)


def rows(pictures: int = 0, facts: tuple[str, ...] = FACTS) -> list[dict[str, Any]]:
    """Two preference rows with prompts and replies of different lengths.

    Args:
        pictures: Chooses the images.
        facts: Of both rows.
    """
    return [
        {
            "images": [picture(10 * pictures + index)],
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "facts": list(facts),
        }
        for index, (question, (chosen, rejected)) in enumerate(zip(_QUESTIONS, _REPLIES, strict=True))
    ]


def preference_batch(processor: ProcessorMixin, *, pictures: int = 0, shares_prefix: bool = False) -> Batch:
    """The rows as the DPO trainer's batch: chosen, then rejected sequences, and `completion_mask`.

    Args:
        processor: The model's.
        pictures: Chooses the images.
        shares_prefix: Whether the images come once per row, with the key that says which sequences share a prompt.
    """
    collator = PreferenceCollator(
        DataCollatorForVisionPreference(processor),
        vision=True,
        tokenizer=processor.tokenizer,
        shares_prefix=shares_prefix,
    )
    return dict(collator(rows(pictures)))


def padded(batch: Mapping[str, Any], columns: int, side: str, filler: int) -> Batch:
    """The batch with further columns of padding.

    Args:
        batch: With `input_ids` and `attention_mask` (B, T).
        columns: How many.
        side: "left" or "right".
        filler: Token of the padding.
    """
    shape, places = batch["input_ids"].shape, (columns, 0) if side == "left" else (0, columns)
    return {
        name: pad(value, places, value=filler if name == "input_ids" else 0)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in batch.items()
    }


def on_device(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch where the model is, with its pixels in the model's precision."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }

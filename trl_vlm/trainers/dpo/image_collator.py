"""Batches with the chosen replies once more, under corrupted images, for the image side of preference."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedConfig

from trl_vlm.data.errors import RowError, as_row_errors
from trl_vlm.data.images import image_digest, load_image
from trl_vlm.data.rows import REJECTED_IMAGES, ROW_NAME, row_images
from trl_vlm.models.image_tokens import check_image_tokens
from trl_vlm.models.masked_images import draw_hidden
from trl_vlm.pairs.crops import cropped
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.noise import Overflow, distorted_images
from trl_vlm.trainers.dpo.collator import ImagesOnce, PreferenceBatch, PreferenceCollator, Row
from trl_vlm.trainers.types import NumberedRows

# The batch key, a dictionary: what the processor makes of the chosen replies under the corrupted images, with
# `completion_mask` and, where image tokens are hidden, `hidden`; all (P, T') but the pixels, which come once per row.
IMAGE_PAIR: Final = "image_pair"
HIDDEN: Final = "hidden"

ATTEMPTS = 100  # to find another image in the data


@dataclass(frozen=True)
class Corruption:
    """How the images of a row are corrupted that has no `rejected_images`.

    Args:
        kind: "mask", "noise", "crop" or "other"; None for rows that all bring their images.
        mask_ratio: Share of the image tokens that a mask hides.
        noise_steps: Of "noise".
        noise_overflow: Of "noise".
        crop_areas: Of "crop", the smallest and the largest share of the area.
        seed: One draw per row; None: another one in every epoch.
    """

    kind: str | None
    mask_ratio: float = 1.0
    noise_steps: int = 500
    noise_overflow: Overflow = "wrap"
    crop_areas: tuple[float, float] = (0.01, 0.2)
    seed: int | None = None

    @property
    def description(self) -> str:
        """All that the corruption of a row depends on beside the row, for the reference cache."""
        options = {
            "mask": self.mask_ratio,
            "noise": (self.noise_steps, self.noise_overflow),
            "crop": self.crop_areas,
        }
        return f"{self.kind} {options.get(self.kind or '')} {self.seed}"


class BatchOfPairs(Protocol):
    """A collator of pairs."""

    def __call__(self, rows: list[Row], /) -> PreferenceBatch:
        """The batch of these rows."""
        ...


class ImagePairCollator:
    """Adds the chosen replies under corrupted images to a batch of pairs, see `IMAGE_PAIR`.

    They are encoded on their own, since another image may have another number of tokens.

    Args:
        collate: Makes the batch.
        pairs: The collator of pairs inside it.
        corruption: For rows without `rejected_images`.
        draws: The random numbers of the row of a name, where the corruption has no seed.
        config: The model's, which knows its image tokens.
        others: The rows that "other" takes images from.
    """

    def __init__(
        self,
        collate: BatchOfPairs,
        pairs: PreferenceCollator,
        corruption: Corruption,
        draws: Callable[[str], Draws],
        config: PreTrainedConfig,
        others: NumberedRows | None = None,
    ):
        self.collate, self.pairs, self.corruption = collate, pairs, corruption
        self.draws = draws if corruption.seed is None else functools.partial(Draws, corruption.seed, 0)
        self.config, self.others = config, others
        images_once = pairs.images_once
        pairs.caches_image_pair = True
        self.once = ImagesOnce(pairs.collate.processor if images_once is None else images_once.processor)
        self.encode = copy.copy(pairs.collate)
        self.encode.processor = self.once

    @property
    def shares_prefix(self) -> bool:
        """Whether the model shares prefixes."""
        return self.pairs.shares_prefix

    @property
    def reference(self) -> Callable[[Row], Sequence[Tensor]] | None:
        """Gives the reference log-probabilities of a row, those under the corrupted image last."""
        return self.pairs.reference

    @reference.setter
    def reference(self, of_row: Callable[[Row], Sequence[Tensor]]) -> None:
        self.pairs.reference = of_row

    def __call__(self, rows: Sequence[Row]) -> PreferenceBatch:
        """The batch of `rows`, which are not changed."""
        loaded = [self.pairs.loaded(row, index) for index, row in enumerate(rows)]
        # Rows are known to a cache by their images as they are stored.
        batch = self.collate(list(rows) if self.reference is not None else loaded)
        draws = [self.draws(row[ROW_NAME]) for row in loaded]
        corrupted = [self._corrupted(row, own) for row, own in zip(loaded, draws, strict=True)]
        pair = self._encoded(loaded, corrupted)
        if self.corruption.kind == "mask":
            pair[HIDDEN] = self._hidden(pair["input_ids"], loaded, draws)
        self._check_replies(pair, batch, loaded)
        batch[IMAGE_PAIR] = pair
        return batch

    def _corrupted(self, row: Row, draws: Draws) -> list[Image]:
        name, images = row[ROW_NAME], row["images"]
        if not images:
            raise RowError(
                f"{name}: it has no image, and `image_weight` compares two. Drop rows without images, or unset "
                "`image_weight`, `image_preset` and `image_metrics`."
            )
        given = row.get(REJECTED_IMAGES)
        if given is not None:
            return [load_image(image, name=f"{name}, rejected image {place}") for place, image in enumerate(given)]
        corruption = self.corruption
        if corruption.kind == "mask":
            return images
        if corruption.kind == "noise":
            steps, overflow = corruption.noise_steps, corruption.noise_overflow
            return distorted_images(images, steps, draws, indexing="code", overflow=overflow)
        if corruption.kind == "crop":
            numbers, (least, most) = draws.random("crop"), corruption.crop_areas
            return [cropped(image, numbers, least=least, most=most) for image in images]
        if corruption.kind == "other":
            return self._others(row, draws)
        raise RowError(
            f"{name}: it has no `rejected_images`, and `image_corruption` is not set. Fill the column in, or set "
            "`image_corruption`, which is taken for such rows."
        )

    def _others(self, row: Row, draws: Draws) -> list[Image]:
        """As many images of other rows as the row has."""
        assert self.others is not None  # refused without
        name, numbers = row[ROW_NAME], draws.random("other")
        own, found = {image_digest(image, name=name) for image in row["images"]}, []
        for _ in range(ATTEMPTS * len(row["images"])):
            other = self.others[numbers.randrange(len(self.others))]
            if other.get(ROW_NAME) == name:
                continue
            for place, value in enumerate(row_images(other, name)):
                image = load_image(value, name=f"{other.get(ROW_NAME)}, image {place}")
                if image_digest(image, name=name) not in own and len(found) < len(row["images"]):
                    found.append(image)
            if len(found) == len(row["images"]):
                return found
        raise RowError(
            f"{name}: {ATTEMPTS} other rows drawn from the training data held no other image, which "
            "`image_corruption='other'` needs. Take another corruption, or data with several images."
        )

    def _encoded(self, rows: list[Row], images: list[list[Image]]) -> dict[str, Tensor]:
        """The prompts with these images and the chosen replies, P sequences."""
        self.once.rows = len(rows)
        batch = self.encode(
            [{**row, "images": own, "rejected": row["chosen"]} for row, own in zip(rows, images, strict=True)]
        )
        shape = batch["input_ids"].shape
        kept = {
            name: value[: len(rows)] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in batch.items()
        }
        if self.pairs.count_image_tokens:
            names = [row[ROW_NAME] for row in rows]
            with as_row_errors():
                check_image_tokens(kept, [len(own) for own in images], self.once.processor, names)
        return kept

    def _hidden(self, input_ids: Tensor, rows: list[Row], draws: list[Draws]) -> Tensor:
        """(P, T'), bool: the image tokens to hide, none of a row that brings its images."""
        generators = [own.generator("mask") for own in draws]
        hidden = draw_hidden(
            input_ids, self.config, self.corruption.mask_ratio, generators, [row[ROW_NAME] for row in rows]
        )
        brings_images = torch.tensor([row.get(REJECTED_IMAGES) is not None for row in rows])
        return hidden & ~brings_images[:, None]

    def _check_replies(self, pair: Mapping[str, Tensor], batch: Mapping[str, Any], rows: list[Row]) -> None:
        """The reply must be whole under both images: `max_length` may cut more of it behind a larger one."""
        counts = pair["completion_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
        for row, found, wanted in zip(rows, *counts, strict=False):
            if found != wanted:
                raise RowError(
                    f"{row[ROW_NAME]}: the chosen reply has {wanted} tokens under its image and {found} under the "
                    "other one, whose tokens leave less room. Raise `max_length` or set it to None."
                )

"""Rejected replies of the policy to a retouched image: other colors, or hardly any resolution."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from PIL import Image, ImageEnhance

from trl_vlm.data.errors import RowError
from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.data.rows import IMAGE_COLUMNS, Row, name_of
from trl_vlm.models.generation import Reply
from trl_vlm.pairs.samples import (
    CACHE_HELP,
    EMPTY_SAMPLE,
    MAX_CACHE_GIB,
    SAME_AS_REFERENCE,
    check_cache,
    check_sampling,
    preference_row,
    sampled_replies,
)
from trl_vlm.pairs.source import Policy, images_of, reference_reply, row_draws

Change = Literal["color", "resolution", "either"]


@dataclass(eq=False, kw_only=True)
class Retouched:
    """A pair source: the reference is chosen, and a sample of the policy that saw retouched images rejected.

    All images of a row are changed in the same kind of way. A row gets `chosen`, `rejected`, and
        pair_source: "retouched".
        pair_change: "color" or "resolution".
        pair_unfinished: Whether `max_new_tokens` ended the rejected reply.

    Args:
        change: "color" changes brightness and hue, "resolution" leaves a few pixels, "either" draws one of both
            for each row.
        brightness: Colors are multiplied by a factor drawn from 1 - `brightness` to 1 + `brightness`.
        hue: The hue is turned by a share of the circle drawn from -`hue` to `hue`.
        pixels: What "resolution" leaves of the shorter side; the image is then scaled back to its size.
        temperature: 0 is greedy decoding.
        max_new_tokens: Longest sample.
        max_cache_gib: Most keys and values at once, in GiB.
        max_image_pixels: Largest image, width times height.
        seed: Of the changes and the samples.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.

    Source: STIC (arXiv:2405.19716), with its brightness and hue.
    Differs: STIC also takes replies to a misleading request, which `Corrupted` does in another way; its size of the
    small image was not checked, and an image keeps its own size here, so that it has as many tokens as before.
    """

    name: ClassVar[str] = "retouched"
    needs_policy: ClassVar[bool] = True
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"max_cache_gib"})

    change: Change = field(default="either", metadata={"help": "What is changed; either draws one for each row."})
    brightness: float = field(default=0.5, metadata={"help": "Largest change of the brightness, 0 to 1."})
    hue: float = field(default=0.3, metadata={"help": "Largest turn of the hue, 0 to 0.5 of the circle."})
    pixels: int = field(default=20, metadata={"help": "Pixels that a low resolution leaves of the shorter side."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy decoding."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest sample, in tokens."})
    max_cache_gib: float = field(default=MAX_CACHE_GIB, metadata={"help": CACHE_HELP})
    max_image_pixels: int | None = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "Largest image, width times height."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the changes and of the samples."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        check_sampling(self.temperature, self.max_new_tokens)
        check_cache(self.max_cache_gib)
        if self.change not in get_args(Change):
            raise ValueError(f"`change` is {self.change!r}; it must be one of {', '.join(get_args(Change))}.")
        ranges = {
            "brightness": (self.brightness, 0 <= self.brightness <= 1, "from 0 to 1"),
            "hue": (self.hue, 0 <= self.hue <= 0.5, "from 0 to 0.5"),
            "pixels": (self.pixels, self.pixels >= 1, "1 or more"),
        }
        for name, (value, is_in_range, wanted) in ranges.items():
            if not is_in_range:
                raise ValueError(f"`{name}` is {value}; it must be {wanted}.")

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row per row; None where the sample is empty or says the same as the reference.

        Raises:
            ValueError: A row has no image, no prompt or no reference reply; the error names it.
        """
        references = [reference_reply(row, name_of(row, index)).strip() for index, row in enumerate(rows)]
        changed = [self._changed(row, index, round) for index, row in enumerate(rows)]
        samples = sampled_replies(
            [row for row, _ in changed],
            policy,
            replies=1,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            round=round,
            max_cache_gib=self.max_cache_gib,
        )
        return [
            self._pair(row, reference, change, sample)
            for row, reference, (_, change), (sample,) in zip(rows, references, changed, samples, strict=True)
        ]

    def _changed(self, row: Row, index: int, round: int) -> tuple[Row, str]:
        """The row with retouched images, and what was changed."""
        name = name_of(row, index)
        images = images_of(row, name, self.max_image_pixels)
        if not images:
            raise RowError(
                f"{name}: it has no image that could be retouched. Drop rows without images, or take their pairs from "
                "another source."
            )
        draws = row_draws(row, index, self.seed, round).random("retouch")
        change = draws.choice(("color", "resolution")) if self.change == "either" else self.change
        retouched = [
            with_other_colors(image, draws, brightness=self.brightness, hue=self.hue)
            if change == "color"
            else with_few_pixels(image, self.pixels)
            for image in images
        ]
        kept = {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
        return {**kept, "images": retouched}, change

    def _pair(self, row: Row, reference: str, change: str, sample: Reply) -> Row | None:
        if not sample.text or sample.text == reference:
            self.dropped[SAME_AS_REFERENCE if sample.text else EMPTY_SAMPLE] += 1
            return None
        return preference_row(
            row, reference, sample.text, source=self.name, change=change, unfinished=not sample.is_finished
        )


def with_other_colors(image: Image.Image, draws: random.Random, *, brightness: float, hue: float) -> Image.Image:
    """The image with another brightness and turned hues; the argument is not modified.

    Args:
        image: RGB.
        draws: The same draws give the same image.
        brightness: The factor is drawn evenly from 1 - `brightness` to 1 + `brightness`.
        hue: The turn is drawn evenly from -`hue` to `hue`, as a share of the circle.
    """
    brighter = ImageEnhance.Brightness(image).enhance(draws.uniform(1 - brightness, 1 + brightness))
    turn = round(256 * draws.uniform(-hue, hue))
    hues, saturation, value = brighter.convert("HSV").split()
    turned = hues.point([(place + turn) % 256 for place in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def with_few_pixels(image: Image.Image, pixels: int) -> Image.Image:
    """The image at its own size, from which all but so many pixels of the shorter side are lost."""
    share, (width, height) = min(1.0, pixels / min(image.size)), image.size
    size = max(1, round(width * share)), max(1, round(height * share))
    small = image.resize(size, Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)

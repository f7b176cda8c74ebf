"""Random crops of images, scaled back to the image's own size, so that it keeps its number of tokens."""

import math
import random

from PIL import Image

RATIOS = (3 / 4, 4 / 3)  # of width to height
ATTEMPTS = 10


def check_crop(least: float, most: float) -> None:
    """Raises ValueError unless 0 < `least` <= `most` <= 1."""
    if not 0 < least <= most <= 1:
        raise ValueError(
            f"A random crop keeps from {least} to {most} of an image's area; both must be above 0 and at most 1, the "
            "smaller one first."
        )


def cropped(image: Image.Image, draws: random.Random, *, least: float, most: float) -> Image.Image:
    """A random part of an image, as large as the image; the argument is not modified.

    The part's share of the area is drawn evenly from `least` to `most`, the logarithm of its aspect ratio evenly
    between those of 3/4 and 4/3. If ten draws in a row do not fit, it is a square around the middle.

    Args:
        image: At its own resolution.
        draws: The same draws give the same crop.
        least: Smallest share of the area.
        most: Largest share of the area.

    Source: the random resized crop of common image libraries, which mDPO's public code takes with 0.01 to 0.2.
    """
    check_crop(least, most)
    width, height = image.size
    for _ in range(ATTEMPTS):
        area = width * height * draws.uniform(least, most)
        ratio = math.exp(draws.uniform(*map(math.log, RATIOS)))
        part = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if part[0] <= width and part[1] <= height:
            left, top = draws.randint(0, width - part[0]), draws.randint(0, height - part[1])
            break
    else:
        side = max(1, min(width, height, round(math.sqrt(width * height * (least + most) / 2))))
        part = side, side
        left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + part[0], top + part[1]))

"""What trainers refuse: options that exclude each other, rates below zero, a model that is blind to its images."""

from collections.abc import Mapping

import torch
from torch import Tensor

# A difference below this is rounding, in nats or units of reward.
BLIND_BELOW = 1e-6


def refuse(what: str, options: Mapping[str, tuple[bool, str]]) -> None:
    """Stop at the first option that is set and cannot be combined with something else.

    Args:
        what: What the options exclude, as the message names it: "`pair_source`", "Dense DPO".
        options: For each option, by its name in the message: whether it is set, and why the two exclude each other.

    Raises:
        ValueError: An option is set.
    """
    for name, (is_set, reason) in options.items():
        if is_set:
            raise ValueError(f"{name} cannot be combined with {what}: {reason}. Unset one of the two.")


def refuse_negative(values: Mapping[str, float | None], why: str) -> None:
    """Stop at the first value below zero, or that is no number; None is a value that is not set.

    Raises:
        ValueError: A value is negative or nan.
    """
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` is {value}; it must not be negative: {why}. Set it to 0 or more.")


def other_pixels(pixels: Tensor) -> Tensor:
    """Other images of the same shape, so that every other input stays as it is: each pixel moves by at least one.

    Zeros stay: Idefics3 and SmolVLM pad a row's tiles with them, and count a tile with another value as one more.
    """
    moved = torch.where(pixels.abs() < 0.5, pixels + 1, -pixels)
    return torch.where(pixels == 0, pixels, moved)


def check_depends_on_pixels(output: Tensor, output_on_other_pixels: Tensor, what: str) -> None:
    """Stop before training a model that does not look at its images.

    Args:
        output: Any shape, what the model computes for a batch with images.
        output_on_other_pixels: The same shape, for the same batch with other pixels.
        what: What the outputs are, for the message.
    """
    difference = (output.float() - output_on_other_pixels.float()).abs().max().item()
    if difference < BLIND_BELOW:
        raise RuntimeError(
            f"The {what} do not depend on the pixels: other images change them by {difference:.1e}. The model is "
            "blind to its images (a projector initialised to zeros, image tokens cut off, pixels lost by a collator "
            "or a generation backend), and would learn from the text alone. Check the checkpoint and the processor, "
            "or pass `check_pixels=False` if this is meant."
        )

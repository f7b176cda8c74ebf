"""What every trainer does to a vision-language model, the same way."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from trl_vlm.models._transformers import keep_4bit_layers_trainable, keep_parameter_names
from trl_vlm.models.parts import freeze_vision_tower, trainable_parameter_table

logger = logging.getLogger(__name__)

# A difference below this is rounding, in nats or units of reward.
BLIND_BELOW = 1e-6


def prepare_vlm(model: nn.Module, *, freeze_vision: bool) -> None:
    """Make a model resumable, freeze its vision tower if asked to, and log its trainable parameters by part."""
    keep_parameter_names(model)
    keep_4bit_layers_trainable(model)
    if freeze_vision:
        freeze_vision_tower(model)
    logger.info("Trainable parameters of %s:\n%s", type(model).__name__, trainable_parameter_table(model))


def set_tokenizer_defaults(processor: ProcessorMixin) -> None:
    """Give the tokenizer a padding token: its end-of-reply token, as TRL does, if it has none."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def other_pixels(pixels: Tensor) -> Tensor:
    """Other images of the same shape, so that every other input stays as it is: each pixel moves by at least one.

    Zeros stay: Idefics3 and SmolVLM pad a row's tiles with them, and count a tile with another value as one more.
    """
    moved = torch.where(pixels.abs() < 0.5, pixels + 1, -pixels)
    return torch.where(pixels == 0, pixels, moved)


def check_depends_on_pixels(output: Tensor, output_on_other_pixels: Tensor, what: str) -> None:
    """Stop before training a model that does not look at its images.

    Args:
        output: any shape, what the model computes for a batch with images.
        output_on_other_pixels: the same shape, for the same batch with other pixels.
        what: what the outputs are, for the message.
    """
    difference = (output.float() - output_on_other_pixels.float()).abs().max().item()
    if difference < BLIND_BELOW:
        raise RuntimeError(
            f"The {what} do not depend on the pixels: other images change them by {difference:.1e}. The model is "
            "blind to its images (a projector initialised to zeros, image tokens cut off, pixels lost by a collator "
            "or a generation backend), and would learn from the text alone. Check the checkpoint and the processor, "
            "or pass `check_pixels=False` if this is meant."
        )


def give_own_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Move `parameters` into optimiser groups of their own with learning rate `rate`; other settings stay.

    Call it before the learning rate scheduler is made: the scheduler scales each group's own rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if not moved:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        optimizer.add_param_group({**settings, "params": moved, "lr": rate})

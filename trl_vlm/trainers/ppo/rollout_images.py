"""Details about the images of some families that TRL's pass over a rollout does not handle."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from trl_vlm.models.families import IMAGE_INPUTS, TOKEN_TYPES, family_of


def family_inputs(config: PreTrainedConfig, inputs: dict[str, Any], reply_tokens: int) -> dict[str, Any]:
    """The keyword arguments of TRL's log-probability pass as the model's family needs them.

    Args:
        config: Of the policy.
        inputs: The arguments; not modified.
        reply_tokens: How many of the last columns get the token type of replies.
    """
    family, inputs = family_of(config), dict(inputs)
    # What the processor says about a whole rollout; `readable_images` says it about each part.
    inputs.pop("batch_num_images", None)
    token_types = inputs.get("token_type_ids")
    if token_types is not None and family.reply_type and reply_tokens:
        # TRL gives replies type 0, which PaliGemma reads as the prompt and attends to in both directions: every token
        # would see the ones after it. Delete when trl.GRPOTrainer gives PaliGemma's replies type 1.
        inputs["token_type_ids"] = token_types.clone()
        inputs["token_type_ids"][:, -reply_tokens:] = family.reply_type
    counts = images_per_row(inputs)
    return inputs if counts is None else inputs | {"num_images": counts}


def images_per_row(batch: Mapping[str, Any]) -> list[int] | None:
    """1 per row where pixels come once per row, padded to the most images of a row (Idefics3, SmolVLM); else None.

    TRL takes pixels for one entry per image where their number equals the sum of `num_images`, which rows with
    2, 2, 0 and 0 images also have, and then gives rows the images of others. Delete when
    `split_pixel_values_by_grid` tells the two layouts apart.
    """
    by_row = batch.get("pixel_attention_mask") is not None and batch.get("spatial_shapes") is None
    return [1] * len(batch["pixel_values"]) if by_row else None


def readable_images(inputs: Mapping[str, Any], config: PreTrainedConfig, num_images: Sequence[int]) -> dict[str, Any]:
    """The inputs of some rows with the image arguments that their model needs, and none where no row has an image.

    A mini-batch of text-only rows comes with an empty slice of the rollout's images, or (Idefics3, SmolVLM) with one
    image of padding for each row; models fail at both.

    Args:
        inputs: Of the model.
        config: Of the policy.
        num_images: Of each row.
    """
    pixels, padding = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
    if pixels is None:
        return dict(inputs)
    if len(pixels) == 0 or (padding is not None and not padding.any()):
        return {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
    if not family_of(config).needs_image_counts:
        return dict(inputs)
    counts = [count for count in num_images if count]
    return {**inputs, "batch_num_images": torch.tensor(counts, device=pixels.device)}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor | list[int]]:
    """The arguments of TRL's log-probability pass beside token ids, taken from a rollout."""
    return {name: batch[name] for name in (*IMAGE_INPUTS, *TOKEN_TYPES) if name in batch}

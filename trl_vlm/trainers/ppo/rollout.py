"""The batch of a rollout: TRL's, with PPO's additions."""

from collections.abc import Sequence
from typing import Required, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad


class Rollout(TypedDict, total=False):
    """B prompts and replies of at most T tokens. The batch also holds the inputs of the model's family.

    Attributes:
        prompt_ids: (B, P).
        prompt_mask: (B, P), 1 on the prompt.
        completion_ids: (B, T).
        completion_mask: (B, T), 1 on the reply.
        tool_mask: (B, T), 0 on the output of a tool.
        num_items_in_batch: Reply tokens of an optimizer step on all processes.
        ref_per_token_logps: (B, T), of the reference.
        pixel_values: Of all images.
        num_images: Of each prompt.
        old_per_token_logps: (B, T), of the policy that replied.
        old_values: (B, T), of the critic then.
        advantages: (B, T).
        returns: (B, T), what the critic fits.
    """

    prompt_ids: Required[Tensor]
    prompt_mask: Required[Tensor]
    completion_ids: Required[Tensor]
    completion_mask: Required[Tensor]
    tool_mask: Tensor
    num_items_in_batch: Required[Tensor]
    ref_per_token_logps: Tensor
    pixel_values: Tensor
    num_images: Sequence[int]
    old_per_token_logps: Required[Tensor]
    old_values: Required[Tensor]
    advantages: Required[Tensor]
    returns: Required[Tensor]


def reply_mask(rollout: Rollout) -> Tensor:
    """(B, T), 1 on the tokens that the policy wrote: neither padding nor tool output."""
    mask = rollout["completion_mask"]
    return mask * rollout["tool_mask"] if "tool_mask" in rollout else mask


def widened(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """Values of the tokens of a rollout's longest reply, with zeros for the padding behind it; None stays.

    Args:
        values: (B, t).
        mask: (B, T), T not less than t.
    """
    return None if values is None else pad(values, (0, mask.shape[1] - values.shape[1]))


def has_ended(rollout: Rollout, eos_token_ids: Sequence[int]) -> Tensor:
    """(B,), true for replies that contain an end-of-reply token (padding, which may be the same id, left out)."""
    ids = rollout["completion_ids"]
    ends = torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device))
    return (ends & rollout["completion_mask"].bool()).any(dim=1)

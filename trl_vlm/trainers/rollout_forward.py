"""The forward of a policy, reference or critic over a rollout: each part as its family reads it, each prompt once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from trl_vlm.models.families import IMAGE_INPUTS, is_image_input
from trl_vlm.models.prefix_sharing.groups import rows_by_prompt, share_rows
from trl_vlm.models.prefix_sharing.sharing import FIRST_COLUMN, PLAIN_IMAGES
from trl_vlm.trainers._trl import split_pixel_values_by_grid, unsplit_pixel_values_by_grid
from trl_vlm.trainers.ppo.rollout_images import readable_images


class RolloutForward:
    """Called where TRL calls a model on one part of a rollout after the other.

    Args:
        model: Policy, reference or critic, wrapped as the backend wraps it.
        config: Of the policy; all of them are of its family.
        reply_tokens: How many of the last columns belong to replies.
        shares: Whether the model's backbone has `share_prefix`: then each prompt, and its images, goes through the
            model once for all replies to it that a part holds.
        tries: Whether a first part decides if it does: all processes come with theirs, whatever it holds.
        num_images: Of each row of the rollout.
        num_tiles: The same for families that cut images into tiles.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: PreTrainedConfig,
        reply_tokens: int,
        *,
        shares: bool = False,
        tries: bool = False,
        num_images: Sequence[int] | None = None,
        num_tiles: Sequence[int] | None = None,
    ):
        self.model, self.config, self.reply_tokens = model, config, reply_tokens
        self.shares, self.tries = shares, tries
        counts = {"num_images": num_images, "num_tiles": num_tiles}
        self.counts = {name: list(values) for name, values in counts.items() if values is not None}
        self._next = 0

    def __call__(self, *, labels: Tensor, **inputs: Any) -> Any:
        """As `model`, on the rows after those of the last call; what it returns per token may be of replies alone.

        Args:
            labels: (n, T), of which only the replies' columns count.
            inputs: The other arguments of the model.
        """
        rows = slice(self._next, self._next + len(labels))
        self._next = rows.stop
        counts = {name: values[rows] for name, values in self.counts.items()}
        plain = readable_images(inputs, self.config, counts.get("num_images", ()))
        shared = self._with_prompts_once(plain, counts) if self.shares else None
        if shared is None:
            return self.model(**plain, labels=labels)
        first = labels.size(1) - self.reply_tokens - 1
        return self.model(**shared, **{FIRST_COLUMN: first}, labels=labels[:, first:])

    def _with_prompts_once(self, plain: dict[str, Any], counts: dict[str, list[int]]) -> dict[str, Any] | None:
        """The same rows with the images of each prompt once, and which rows share one; None where none do."""
        ids, mask = plain["input_ids"], plain["attention_mask"]
        if self._has_images_in_replies(ids):
            return None
        split = _split_images(plain, counts)
        prompt_mask = mask[:, : -self.reply_tokens]
        rows = rows_by_prompt(ids[:, : -self.reply_tokens], prompt_mask, split)
        firsts = [rows.index(row) for row in range(max(rows) + 1)]
        if len(firsts) == len(rows) and not self.tries:
            return None
        once = unsplit_pixel_values_by_grid({name: _picked(values, firsts) for name, values in split.items()})
        shared_prefix = torch.stack([torch.tensor(rows, device=mask.device), prompt_mask.sum(1)], dim=1)
        num_images = [counts["num_images"][place] for place in firsts] if once else ()
        shared: dict[str, Any] = readable_images(share_rows(plain, shared_prefix, once), self.config, num_images)
        # Where sharing does not pay, the backbone reads these.
        return shared | {PLAIN_IMAGES: {name: value for name, value in plain.items() if is_image_input(name)}}

    def _has_images_in_replies(self, ids: Tensor) -> bool:
        """Tools may return images, which belong to one reply alone."""
        token = getattr(self.config, "image_token_id", None)  # or another name, which the config maps to this one
        return token is not None and bool((ids[:, -self.reply_tokens :] == token).any())


def _split_images(inputs: dict[str, Any], counts: dict[str, list[int]]) -> dict[str, Any]:
    """The image inputs of a part, by name, with one entry per row."""
    images = {name: value for name, value in inputs.items() if name in IMAGE_INPUTS and name != "batch_num_images"}
    if not images:
        return {}
    split = split_pixel_values_by_grid({**images, **counts})
    return {name: split[name] for name in images}


def _picked(values: Sequence[Tensor] | Tensor, places: list[int]) -> Any:
    return values[places] if isinstance(values, Tensor) else [values[place] for place in places]

"""Prompts and replies of a batch without its padding, as continuations read them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from trl_vlm.models import _transformers
from trl_vlm.models.families import family_of
from trl_vlm.models.image_tokens import image_token_id


class Rows(NamedTuple):
    """Prompts followed by their replies: B rows of L tokens, padded on the right.

    ids, is_image: (B, L).
    types: Whatever else has one entry per token, (B, L) each.
    positions: (B, L), or (4, B, L) for Qwen-VL.
    prompts, replies: Lengths, B each.
    filler: A token for padding that is no image token.
    batch_ids, attended: (B, T), the ids and the attention mask as they came.
    """

    ids: Tensor
    is_image: Tensor
    types: dict[str, Tensor]
    positions: Tensor
    prompts: list[int]
    replies: list[int]
    filler: int
    batch_ids: Tensor
    attended: Tensor

    def without_padding(self, values: Tensor) -> Tensor:
        """(B, T) bool in the layout of the batch -> (B, L), False at replies and padding."""
        prompts = pad_sequence([row[real] for row, real in zip(values, self.attended, strict=True)], batch_first=True)
        return pad(prompts, (0, self.ids.size(1) - prompts.size(1)))


def rows_of(model: PreTrainedModel, batch: Mapping[str, Tensor], replies: Sequence[Sequence[int]]) -> Rows:
    """The rows of a batch, each followed by its reply.

    Raises:
        ValueError: A reply holds an image token, or a prompt ends with one.
    """
    config, attended = model.config, batch["attention_mask"].bool()
    image = image_token_id(config)
    tails = [torch.tensor(reply, dtype=torch.long, device=attended.device) for reply in replies]
    for row, (ids, real, tail) in enumerate(zip(batch["input_ids"], attended, tails, strict=True)):
        if ids[real][-1] == image or image in tail:
            raise ValueError(
                f"row {row} of the batch: its {'reply holds' if image in tail else 'prompt ends with'} an image "
                "token. Encode prompts with `add_generation_prompt=True`, and replies as text."
            )

    def with_replies(name: str, reply_value: int | None = None) -> Tensor:
        pieces = zip(batch[name], attended, tails, strict=True)
        rows = [
            torch.cat([row[real], tail if reply_value is None else torch.full_like(tail, reply_value)])
            for row, real, tail in pieces
        ]
        return pad_sequence(rows, batch_first=True)

    ids = with_replies("input_ids")
    types = {
        name: with_replies(name, family_of(config).reply_type)
        for name, value in batch.items()
        if value.shape == batch["input_ids"].shape and name not in ("input_ids", "attention_mask")
    }
    prompts, lengths = attended.sum(1).tolist(), [len(reply) for reply in replies]
    ends = torch.tensor(prompts, device=ids.device) + torch.tensor(lengths, device=ids.device)
    attention_mask = (torch.arange(ids.size(1), device=ids.device) < ends[:, None]).long()
    whole = {**batch, **types, "input_ids": ids, "attention_mask": attention_mask}
    positions = _transformers.generation_positions(model, whole)
    is_image = (ids == image) & attention_mask.bool()
    filler = 0 if image != 0 else 1
    return Rows(ids, is_image, types, positions, prompts, lengths, filler, batch["input_ids"], attended)

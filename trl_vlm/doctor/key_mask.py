"""Hidden image tokens by definition: attention written out, with their keys taken out of the scores.

`masked_inputs` hides tokens by the attention mask and explicit positions, which each family reads in its own way. This
leaves mask and positions as they are, and is slow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "trl_vlm_key_mask"


class KeyMask:
    """Attention without the keys of `hidden`, (B, T) bool; later keys, of generated tokens, stay."""

    hidden: Tensor | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the attention functions of transformers."""
        assert self.hidden is not None
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        hidden = pad(self.hidden, (0, key.shape[2] - self.hidden.shape[1]))
        scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None


_KEY_MASK = KeyMask()
AttentionInterface.register(NAME, _KEY_MASK)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def hidden_keys(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """A context in which nothing in the language model of `model` attends to the tokens of `hidden`, (B, T) bool."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": NAME})
    _KEY_MASK.hidden = hidden
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
        _KEY_MASK.hidden = None

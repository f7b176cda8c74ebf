"""Attention over packed batches: each prompt attends to itself, and each reply to its prompt and itself.

The attention of transformers, SDPA, eager or FlashAttention, is called on prompts and replies in place of whole
sequences. A model passes the layout of a batch down to its layers as a keyword argument; its attention mask is empty
meanwhile, so that no layer that does not know the layout can compute something else.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from trl_vlm.models.prefix_sharing.masks import Layout
from trl_vlm.models.prefix_sharing.varlen import varlen, varlen_serves

# The keyword argument, a `Layout`.
LAYOUT = "shared_prefix_layout"

ATTENTION = "trl_vlm_shared_prefix"
EAGER_ATTENTION = "trl_vlm_shared_prefix_eager"
_OURS = {"sdpa": ATTENTION, "eager": EAGER_ATTENTION}

Attend = Callable[..., tuple[Tensor, Tensor | None]]


def can_attend(implementation: str | None) -> bool:
    """Whether packed batches can be read with the attention of this name."""
    return implementation is not None and (implementation in (*_OURS, *_OURS.values()) or "flash" in implementation)


def use_shared_attention(model: PreTrainedModel) -> None:
    """Lets the language model of `model` read packed batches, and others as before."""
    text = model.config.get_text_config()
    name = str(text._attn_implementation)
    if name in _OURS:
        model.set_attn_implementation(_OURS[name] if text is model.config else {"text_config": _OURS[name]})
    elif "flash" in name:
        # transformers finds the kernels by this name, so it stays.
        attend = AttentionInterface()[name]
        if getattr(attend, "func", None) is not _flash_attention:
            AttentionInterface.register(name, functools.partial(_flash_attention, attend))


def empty_mask(device: torch.device) -> Tensor:
    """The mask of a packed batch: of four dimensions, which transformers passes on as it is, and without values."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def _reads_packed(attention_mask: Tensor | None, layout: Layout | None) -> bool:
    is_packed = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.numel() == 0
    if is_packed and layout is None:
        raise ValueError(
            "The model does not pass keyword arguments on to its attention, so replies stay unknown there."
        )
    return is_packed


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if not _reads_packed(attention_mask, shared_prefix_layout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert shared_prefix_layout is not None
    if shared_prefix_layout.flat is not None and varlen_serves(query, key, value, **kwargs):
        return varlen(query, key, value, shared_prefix_layout.flat, **kwargs), None
    return _in_calls(sdpa_attention_forward, module, query, key, value, shared_prefix_layout, **kwargs), None


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # Each family has its own, in the file of its layers.
    attend: Attend = sys.modules[type(module).__module__].eager_attention_forward
    if not _reads_packed(attention_mask, shared_prefix_layout):
        return attend(module, query, key, value, attention_mask, **kwargs)
    assert shared_prefix_layout is not None
    return _in_calls(attend, module, query, key, value, shared_prefix_layout, **kwargs), None


def _flash_attention(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if not _reads_packed(attention_mask, shared_prefix_layout):
        return attend(module, query, key, value, attention_mask, **kwargs)
    assert shared_prefix_layout is not None and shared_prefix_layout.flat is not None
    flat = shared_prefix_layout.flat
    lengths = {
        "cu_seq_lens_q": flat.query_ends,
        "cu_seq_lens_k": flat.key_ends,
        "max_length_q": flat.most_queries,
        "max_length_k": flat.most_keys,
    }
    keys, values = (states.index_select(2, flat.keys) for states in (key, value))
    return attend(module, query, keys, values, None, **{**kwargs, **lengths})


def _in_calls(
    attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, **kwargs: Any
) -> Tensor:
    """(1, L, H, D): the prompts and replies in padded calls of `attend`."""
    has_window = kwargs.get("sliding_window") is not None
    tokens = [states.transpose(1, 2)[0] for states in (query, key, value)]  # (L, H, D)
    attended = []
    for call in layout.calls:
        padded = [
            states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
            for states, places in zip(tokens, (call.queries, call.keys, call.keys), strict=True)
        ]
        states, _ = attend(module, *padded, call.sliding if has_window else call.full, **kwargs)
        attended.append(states.flatten(0, 1))
    return torch.cat(attended).index_select(0, layout.back)[None]


AttentionInterface.register(ATTENTION, _sdpa)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(EAGER_ATTENTION, _eager)
AttentionMaskInterface.register(EAGER_ATTENTION, eager_mask)

"""torch's variable-length attention, where it runs: no padding, no mask, and each key is read once per reply."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trl_vlm.models.prefix_sharing.masks import Flat

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

# A tiny batch must come out as through SDPA, up to the rounding of bfloat16.
_TOLERANCE = 5e-2


def varlen_serves(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> bool:
    """Whether `varlen` can take these states: not on a CPU, in float32, with dropout, or with torch before 2.10.

    Args:
        query: (1, H, L, D).
        key: (1, H', L, D).
        value: (1, H', L, D').
        kwargs: Those of transformers' attention.
    """
    if varlen_attn is None or not query.is_cuda or kwargs.get("dropout") or kwargs.get("softcap") is not None:
        return False
    size = query.size(-1)
    return size == value.size(-1) and runs_here(query.device, _dtype(query), query.size(1), key.size(1), size)


def varlen(query: Tensor, key: Tensor, value: Tensor, flat: Flat, **kwargs: Any) -> Tensor:
    """Attention of packed prompts and replies, each to its own keys, causally from the bottom right.

    Args:
        query: (1, H, L, D), the packed tokens.
        key: (1, H', L, D); H' divides H.
        value: The same.
        flat: Where prompts and replies begin, and what their keys are.
        kwargs: Those of transformers' attention: `scaling`, `sliding_window`.

    Returns:
        (1, L, H, D).
    """
    queries, keys, values = (states.transpose(1, 2)[0].to(_dtype(query)) for states in (query, key, value))
    keys, values = (states.index_select(0, flat.keys) for states in (keys, values))
    return _attend(queries, keys, values, flat, kwargs.get("sliding_window"), kwargs.get("scaling"))[None]


def _dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _attend(
    query: Tensor, key: Tensor, value: Tensor, flat: Flat, window: int | None, scaling: float | None
) -> Tensor:
    """(L, H, D) queries and (M, H', D) keys and values -> (L, H, D)."""
    assert varlen_attn is not None
    states = varlen_attn(
        query,
        key,
        value,
        flat.query_ends,
        flat.key_ends,
        flat.most_queries,
        flat.most_keys,
        scale=scaling,
        # The token itself is not counted here, and is in transformers.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    assert isinstance(states, Tensor)  # no further output was asked for
    return states


@functools.cache
def runs_here(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether the kernels give, for a tiny prompt with two replies, what SDPA gives, gradients too."""
    if dtype not in (torch.float16, torch.bfloat16) or size > 256:
        return False
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            return _agrees_with_sdpa(device, dtype, heads, key_heads, size)
    except (RuntimeError, TypeError, ValueError, AssertionError):  # kernels that this build or this card lacks
        return False


def _agrees_with_sdpa(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    shapes = [(12, heads, size), (12, key_heads, size), (12, key_heads, size)]
    states = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator).to(device, dtype)
    # A prompt of 5 tokens with replies of 4 and 3.
    keys = torch.tensor([*range(5), *range(9), *range(5), 9, 10, 11], device=device)
    query_ends = torch.tensor([0, 5, 9, 12], dtype=torch.int32, device=device)
    flat = Flat(keys, query_ends, torch.tensor([0, 5, 14, 22], dtype=torch.int32, device=device), 5, 9)
    column = torch.tensor([*range(9), 5, 6, 7], device=device)
    reply = torch.tensor([0] * 5 + [1] * 4 + [2] * 3, device=device)
    is_seen = (column[:, None] >= column) & ((reply == 0) | (reply[:, None] == reply))
    for window in (None, 3):
        near = is_seen if window is None else is_seen & (column[:, None] - column < window)
        query, key, value = states
        found = _attend(query, key.index_select(0, keys), value.index_select(0, keys), flat, window, None)
        wanted = functional.scaled_dot_product_attention(
            *(one.transpose(0, 1)[None] for one in states), attn_mask=near, enable_gqa=heads != key_heads
        )[0].transpose(0, 1)
        pairs = [(found, wanted)]
        pairs += zip(*(torch.autograd.grad((one * weights).sum(), states) for one in (found, wanted)), strict=True)
        if any((one - other).abs().max() > _TOLERANCE * other.abs().max() for one, other in pairs):
            return False
    return True

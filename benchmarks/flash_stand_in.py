"""Stand-ins for kernels of variable length, which run on GPUs only: the same functions, a sequence at a time."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, one sequence at a time: (L, H, D) and twice (M, H', D) -> (L, H, D).

    The last query of a sequence is aligned with its last key, and sees `window_size[0]` keys before it (-1: all).
    """
    (left, right), states = window_size, []
    assert right in (-1, 0) and (enable_gqa or query.size(1) == key.size(1))
    for place in range(len(cu_seqlens_q) - 1):
        one = query[cu_seqlens_q[place] : cu_seqlens_q[place + 1]]
        where = slice(int(cu_seqlens_k[place]), int(cu_seqlens_k[place + 1]))
        assert len(one) <= max_seqlen_q and where.stop - where.start <= max_seqlen_k
        is_causal = right == 0 and left < 0 and len(one) == where.stop - where.start
        attended = functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in (one, key[where], value[where])),
            attn_mask=None if is_causal else _seen(len(one), where.stop - where.start, left, right),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        states.append(attended[0].transpose(0, 1))
    return torch.cat(states)


def _seen(queries: int, keys: int, left: int, right: int) -> Tensor:
    """(Q, K), bool."""
    distance = (keys - queries + torch.arange(queries))[:, None] - torch.arange(keys)
    sees = torch.ones_like(distance, dtype=torch.bool) if right < 0 else distance >= 0
    return sees if left < 0 else sees & (distance <= left)


def slow_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """flash-attn's function of this name."""
    assert dropout_p == 0
    window = (window_size[0], 0 if causal else window_size[1])
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return slow_varlen(q, k, v, *lengths, scale=softmax_scale, window_size=window, enable_gqa=True)


def slow_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """flash-attn's function of this name: B sequences of one length, (B, T, H, D)."""
    ends = torch.arange(len(q) + 1) * q.size(1)
    flat = (states.flatten(0, 1) for states in (q, k, v))
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return slow_flash_attn_varlen_func(*flat, ends, ends, q.size(1), q.size(1), dropout_p, **options).view_as(q)


def lazy_import_flash_attention(implementation: str | None, *args: object, **kwargs: object) -> tuple[tuple, tuple]:
    """transformers' function of this name, with the slow kernels."""
    functions = (slow_flash_attn_func, slow_flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    return functions, (flash._lazy_define_process_function(slow_flash_attn_varlen_func), dict)


def install() -> None:
    """Lets `attn_implementation="flash_attention_2"` use these functions in this process."""
    flash.lazy_import_flash_attention = lazy_import_flash_attention
    flash_attention._use_top_left_mask = False  # as with the newer packages


def use(model: PreTrainedModel) -> None:
    """Gives the language model of `model` this attention; transformers itself would look for the package."""
    model.config.get_text_config()._attn_implementation = "flash_attention_2"

"""Which keys the prompts and replies of a packed batch attend to; see `sharing`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from trl_vlm.models.families import TOKEN_TYPES, family_of
from trl_vlm.models.prefix_sharing.packing import Packing, Segment, calls_of

_KINDS = ("full_attention", "sliding_attention")


class Call(NamedTuple):
    """Prompts or replies of similar size that are attended to in one call, n of them, padded.

    queries: (n, Q), index into the L packed tokens; 0 for padding.
    keys: (n, K), the same.
    full: (n, 1, Q, K), which queries see which keys; None if all see what is not behind them.
    sliding: The same for layers with a window.
    """

    queries: Tensor
    keys: Tensor
    full: Tensor | None
    sliding: Tensor | None


class Flat(NamedTuple):
    """All prompts and replies of a packed batch for one variable-length call; its queries are the packed tokens.

    keys: (M,), index into the L packed tokens: those of the first prompt, those of its first reply, and so on.
    query_ends: (S + 1,), int32, where the queries of each begin, and where the last ones end.
    key_ends: (S + 1,), int32, the same of the keys.
    most_queries: Of one prompt or reply.
    most_keys: The same.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


class Layout(NamedTuple):
    """How attention reads a packed batch: either in padded calls with masks, or in one of variable length.

    calls: For kernels that take padded batches.
    back: (L,), index into the queries of all calls, one behind the other.
    flat: For kernels that take sequences of any length; None where masks say more than "not behind itself".
    """

    calls: tuple[Call, ...]
    back: Tensor
    flat: Flat | None


def layout_of(config: PreTrainedConfig, slots: Packing, plain: Mapping[str, Tensor], dtype: torch.dtype) -> Layout:
    """How attention reads a packed batch, so that each token sees what it sees in its plain sequence.

    Args:
        config: Of the whole model.
        slots: As made by `packing`.
        plain: The keyword arguments of the plain batch: `attention_mask` (N, T), token types.
        dtype: Of the model's activations; eager attention adds its masks.
    """
    owner, implementation = family_of(config).own_masks, str(config.get_text_config()._attn_implementation)
    device = plain["attention_mask"].device
    if "flash" in implementation:  # it takes no mask, without sharing either
        return Layout((), torch.empty(0, dtype=torch.long, device=device), _flat(slots, device))
    own = None if owner is None else _own_masks(config, owner, plain)
    is_eager = "eager" in implementation
    calls = []
    back, queries_before = torch.zeros(len(slots.source), dtype=torch.long), 0
    for segments in calls_of(slots.segments):
        queries, keys = _columns(segments, "first"), _columns(segments, "start")
        places = _places(slots.target, segments, queries)
        back[places[queries >= 0]] = queries_before + (queries >= 0).flatten().nonzero()[:, 0]
        queries_before += places.numel()
        masks = _masks(config, own, segments, queries.to(device), keys.to(device), needs_all=is_eager)
        if is_eager:
            masks = [None if mask is None else _additive(mask, dtype) for mask in masks]
        calls.append(Call(places.to(device), _places(slots.target, segments, keys).to(device), *masks))
    return Layout(tuple(calls), back.to(device), _flat(slots, device) if own is None and not is_eager else None)


def _columns(segments: Sequence[Segment], first: str) -> Tensor:
    """(n, W): the plain columns of each segment from `first` to its end; -1 for padding."""
    firsts = torch.tensor([getattr(segment, first) for segment in segments])[:, None]
    ends = torch.tensor([segment.end for segment in segments])[:, None]
    columns = firsts + torch.arange(int((ends - firsts).max()))
    return columns.masked_fill(columns >= ends, -1)


def _places(target: Tensor, segments: Sequence[Segment], columns: Tensor) -> Tensor:
    """(n, W): where the columns of plain sequences lie in the packed one; 0 for padding."""
    sequences = torch.tensor([segment.sequence for segment in segments])[:, None]
    return target[sequences, columns.clamp(min=0)].masked_fill(columns < 0, 0)


def _masks(
    config: PreTrainedConfig,
    own: Mapping[str, Tensor] | None,
    segments: Sequence[Segment],
    queries: Tensor,
    keys: Tensor,
    needs_all: bool,
) -> list[Tensor | None]:
    """(n, 1, Q, K) for layers without a window, and for those with one."""
    if own is not None:
        sequences = torch.tensor([segment.sequence for segment in segments], device=keys.device)[:, None, None]
        return [
            _without_nan(
                own[kind][sequences, queries[:, :, None].clamp(min=0), keys[:, None, :].clamp(min=0)], queries, keys
            )
            for kind in _KINDS
        ]
    distance = queries[:, :, None] - keys[:, None, :]
    window = vars(config.get_text_config()).get("sliding_window")
    is_causal = segments[0].is_prompt and not needs_all
    full = None if is_causal else _without_nan(distance >= 0, queries, keys)
    if window is None or max(segment.keys for segment in segments) <= window:
        return [full, full]
    return [full, _without_nan((distance >= 0) & (distance < window), queries, keys)]


def _without_nan(sees: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Padding is not seen, and sees all: a softmax over nothing is nan."""
    return ((sees & (keys >= 0)[:, None, :]) | (queries < 0)[:, :, None])[:, None]


def _own_masks(config: PreTrainedConfig, owner: str, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(N, T, T) by kind of layer: the masks that the generative class called `owner` makes for plain sequences."""
    attention_mask = plain["attention_mask"]
    # The functions read only shape, dtype and device of the embeddings.
    nothing = torch.zeros(1, 1, 1, device=attention_mask.device).expand(*attention_mask.shape, 1)
    masks = getattr(transformers, owner).create_masks_for_generate(
        config=config,
        inputs_embeds=nothing,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=None,
        **{name: plain[name] for name in TOKEN_TYPES if name in plain},
    )
    if not isinstance(masks, dict):
        masks = {"full_attention": masks, "sliding_attention": masks}
    # A model may have layers of one kind only.
    return {kind: _which(masks.get(kind, next(iter(masks.values()))), attention_mask) for kind in _KINDS}


def _which(mask: Tensor | None, attention_mask: Tensor) -> Tensor:
    if mask is None:  # causal
        width = attention_mask.size(1)
        causal = torch.ones(width, width, dtype=torch.bool, device=attention_mask.device).tril()
        return causal.expand(len(attention_mask), -1, -1)
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # eager masks are additive


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _flat(slots: Packing, device: torch.device) -> Flat:
    keys = torch.cat([slots.target[one.sequence, one.start : one.end] for one in slots.segments])
    queries = [one.queries for one in slots.segments]
    counts = [one.keys for one in slots.segments]
    query_ends, key_ends = (torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (queries, counts))
    return Flat(keys.to(device), query_ends, key_ends, max(queries), max(counts))

"""One pass through prompt and image for all replies to it.

The replies of a row follow their common prompt, and the rows follow each other, in one sequence without padding:

    prompt          reply 1   reply 2            attention: the prompt sees itself, each reply sees the prompt
    p p p p p p p   a a a     b b b b            and itself, and no reply is compared with another one
    0 1 2 3 4 5 6   7 8 9     7 8 9 10           positions: each reply continues the prompt

`share_prefix(model)` hooks this into the model's backbone. A batch of plain sequences (N, T), with the images of each
row given once and a tensor `shared_prefix` that says which sequences share a row, is packed on its way in
(`packing`), and the hidden states are unpacked on their way out to (N, T, H). In between, each layer's attention reads
the layout that comes with the batch (`masks`, `attention`, `varlen`). So every head (TRL's fused LM head, a score
head) gets the same input as without sharing, and losses and gradients are equal; `tests/models/prefix_sharing` checks
both for each family of `SHARING_FAMILIES`. Other families, and FlashAttention, are tried on their first batch
(`trial`). A batch that would take longer in this way is computed as if nothing was shared.

It works inside gradient checkpointing (a key-value cache would not: transformers drops the cache there), with LoRA
and with ZeRO, because the model still runs once, on an ordinary batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trl_vlm.models.families import IMAGE_INPUTS, SHARING_FAMILIES, family_of, is_image_input
from trl_vlm.models.prefix_sharing.attention import LAYOUT, can_attend, empty_mask, use_shared_attention
from trl_vlm.models.prefix_sharing.masks import layout_of
from trl_vlm.models.prefix_sharing.packing import Packing, packing, pays
from trl_vlm.models.prefix_sharing.trial import gives_the_same, plain_inputs

# The batch key, (N, 2): for each sequence, the row that it belongs to and the length of its prompt.
SHARED_PREFIX = "shared_prefix"
# Optional second key, an int: the hidden states of earlier columns are not unpacked.
FIRST_COLUMN = "shared_prefix_first_column"
# Optional third key: the image inputs by name as they are without sharing, for sequences that stand in any order.
PLAIN_IMAGES = "shared_prefix_plain_images"
KEYS = (SHARED_PREFIX, FIRST_COLUMN, PLAIN_IMAGES)


def why_not_shareable(config: PreTrainedConfig) -> str | None:
    """Why a model with this config takes the plain path, as one sentence; None if it can share prefixes.

    A family that no test knows can be tried: its first batch is computed in both ways, see `trial`.
    """
    kind, text = config.model_type, config.get_text_config()
    # hasattr: a model that reads images has this attribute under one of two names, and others have neither.
    if not family_of(config).shares_prefix and not hasattr(config, "image_token_id"):
        return f"{kind} is not among the tested families ({', '.join(SHARING_FAMILIES)}), and has no image tokens"
    if not can_attend(text._attn_implementation):
        return (
            f"attention {text._attn_implementation!r} is not known to keep the replies apart; load the model with "
            "attn_implementation='sdpa' or 'flash_attention_2'"
        )
    layers = set(vars(text).get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if layers:
        return f"layers of type {', '.join(sorted(layers))} cannot keep the replies apart"
    if vars(text).get("output_router_logits"):
        return "the auxiliary loss of mixtures of experts counts every token"
    return None


def share_prefix(model: PreTrainedModel, *, is_tested: bool = True) -> None:
    """Lets the backbone of `model` compute a prompt once for all its replies; calling it twice is harmless.

    Args:
        model: With any head, of one of `SHARING_FAMILIES`, or of another family that its first batch decides on. A
            PEFT model gives its `get_base_model()`.
        is_tested: False if the first batch is to decide for any family (Liger kernels), as it always does with
            FlashAttention.
    """
    reason = why_not_shareable(model.config)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot share prefixes: {reason}.")
    backbone = model.base_model
    if _hook_of(model) is not None:
        return
    pack = _Pack(is_proven=None if needs_trial(model.config) or not is_tested else True)
    use_shared_attention(model)
    backbone.register_forward_pre_hook(pack, with_kwargs=True)
    backbone.register_forward_hook(pack.unpack)


def needs_trial(config: PreTrainedConfig) -> bool:
    """Whether the first batch of a model with this config decides: of a family that no test knows, or with flash."""
    return not family_of(config).shares_prefix or "flash" in str(config.get_text_config()._attn_implementation)


def awaits_trial(model: PreTrainedModel) -> bool:
    """Whether the first batch of a model with `share_prefix` is still to decide: all processes come with one."""
    hook = _hook_of(model)
    return hook is not None and hook.is_proven is None


@contextmanager
def always_sharing(model: PreTrainedModel) -> Iterator[None]:
    """A context in which every shared batch is computed once, for code that compares it with the plain path itself.

    Neither does a first batch decide, nor whether it pays. Afterwards the model shares prefixes as usual.
    """
    share_prefix(model)
    pack = _hook_of(model)
    assert pack is not None  # `share_prefix` has added it
    before = pack.is_proven
    pack.is_proven = pack.is_trying = True
    try:
        yield
    finally:
        pack.is_proven, pack.is_trying = before, False


def _hook_of(model: PreTrainedModel) -> "_Pack | None":
    return next((hook for hook in model.base_model._forward_pre_hooks.values() if isinstance(hook, _Pack)), None)


def why_pairs_not_shareable(config: PreTrainedConfig) -> str | None:
    """As `why_not_shareable`, for sequences that a collator makes whole and `share_pairs` puts together."""
    if family_of(config).prefix_is_bidirectional:
        return (
            f"{config.model_type} reads a conversation that was encoded as a whole as one prompt, with attention in "
            "both directions; two replies share nothing there"
        )
    return why_not_shareable(config)


def share_pairs(batch: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """A batch of 2P sequences, chosen rows and then rejected ones, with the images of each pair once instead of twice.

    The shared prefix of a pair is what its two sequences have in common at the beginning. For collators that encode
    both sequences whole, as in reward training; the batch is not modified.

    Args:
        batch: `input_ids` and `attention_mask` (2P, T), right padded, and the pixels, with what belongs to them, of
            the chosen rows and then, the same, of the rejected ones; nothing else.
        config: Of the model that reads it.

    Raises:
        ValueError: The model cannot share prefixes, or reads the replies as part of a prompt that sees all of itself
            (PaliGemma).
    """
    reason = why_pairs_not_shareable(config)
    if reason is not None:
        raise ValueError(f"{reason}. Leave the batch as it is.")
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    pairs = len(ids) // 2
    differs = (ids[:pairs] != ids[pairs:]) | (attention_mask[:pairs] * attention_mask[pairs:] == 0)
    # Also two identical sequences keep their last token apart: it is what their heads read.
    last = attention_mask.sum(1).view(2, pairs).amin(0) - 1
    ends = torch.where(differs.any(1), differs.int().argmax(1).clamp(max=last), last).repeat(2)
    shared = {name: value[: len(value) // 2] if is_image_input(name) else value for name, value in batch.items()}
    return shared | {SHARED_PREFIX: torch.stack([torch.arange(pairs).repeat(2), ends], dim=1)}


class _HiddenStates(Protocol):
    """What a backbone returns."""

    last_hidden_state: Tensor


class _HasGrid(Protocol):
    """Backbones with M-RoPE."""

    def compute_3d_position_ids(self, **inputs: Tensor | None) -> Tensor | None:
        """(3, B, T), or None without images."""
        ...


class _Pack:
    """The hooks around a backbone: packs a batch that carries `SHARED_PREFIX`, and unpacks its hidden states."""

    def __init__(self, is_proven: bool | None) -> None:
        self.is_proven = is_proven  # None: the first batch will tell
        self.is_trying = False
        self.target: Tensor | None = None
        self.first_column = 0

    def __call__(self, backbone: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if SHARED_PREFIX in kwargs and self.is_proven is None:
            self.is_proven = self.is_trying = True  # for the pass that is to prove it
            try:
                self.is_proven = gives_the_same(backbone, kwargs, KEYS)
            finally:
                self.is_trying = False
        self.target, self.first_column = None, 0  # also after a pass that failed
        if SHARED_PREFIX not in kwargs:
            return None
        packed = self._packed(backbone, kwargs) if self.is_proven else None
        if packed is None:
            # The head reads columns from `FIRST_COLUMN` on.
            self.first_column = kwargs.get(FIRST_COLUMN, 0)
            return args, plain_inputs(kwargs, KEYS)
        return args, packed

    def _packed(self, backbone: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The batch with its prompts once, or None where that would take longer."""
        plain = {name: value for name, value in kwargs.items() if name not in KEYS}
        attention_mask, config = plain["attention_mask"], backbone.config
        slots = packing(attention_mask, kwargs[SHARED_PREFIX])
        has_images = any(plain.get(name) is not None for name in IMAGE_INPUTS)
        if not self.is_trying and not pays(config.get_text_config(), attention_mask, slots, has_images):
            return None
        device = attention_mask.device
        self.target = slots.target[:, kwargs.get(FIRST_COLUMN, 0) :].to(device)
        source = slots.source.to(device)
        packed: dict[str, Any] = {name: _pack(name, value, source, plain) for name, value in plain.items()}
        packed["position_ids"] = _positions(backbone, slots, packed)
        packed["attention_mask"] = empty_mask(device)
        packed[LAYOUT] = layout_of(config, slots, plain, backbone.dtype)
        return packed

    def unpack(self, backbone: nn.Module, args: tuple, output: _HiddenStates) -> _HiddenStates:
        """Gives `last_hidden_state` back as plain sequences, (1, L, H) -> (N, T, H)."""
        if self.target is not None:
            states = output.last_hidden_state[0]
            # On several devices the last layer may lie on another one than the batch.
            places = self.target.to(states.device)
            output.last_hidden_state = states.index_select(0, places.flatten()).unflatten(0, places.shape)
        elif self.first_column:
            output.last_hidden_state = output.last_hidden_state[:, self.first_column :]
        self.target, self.first_column = None, 0
        return output


def _pack(name: str, value: object, source: Tensor, plain: Mapping[str, Any]) -> object:
    """A tensor with one entry per token goes through the packing; all else (pixels, sizes, flags) stays."""
    if name == "attention_mask" or not isinstance(value, Tensor) or value.shape != plain["input_ids"].shape:
        return value
    return value.flatten()[source][None]


def _positions(backbone: PreTrainedModel, slots: Packing, packed: Mapping[str, Any]) -> Tensor:
    """(1, L), or (3, 1, L) for Qwen: the positions that the tokens have in their plain sequences."""
    family, device = family_of(backbone.config), packed["input_ids"].device
    # hasattr: this method is what tells M-RoPE in a family that is not in the table.
    has_grid = hasattr(backbone, "compute_3d_position_ids") if family.positions is None else family.positions == "grid"
    if not has_grid:
        return slots.column.to(device)[None] + family.first_position
    places = _prompt_places(slots).to(device)
    is_prompt = places >= 0
    padding = {"input_ids": _filler(backbone.config), "mm_token_type_ids": 0}
    prompts = {
        name: packed[name][0][places.clamp(min=0)].masked_fill(~is_prompt, value)
        for name, value in padding.items()
        if name in packed
    }
    grid = cast(_HasGrid, backbone).compute_3d_position_ids(
        inputs_embeds=None,
        image_grid_thw=packed.get("image_grid_thw"),
        video_grid_thw=packed.get("video_grid_thw"),
        attention_mask=is_prompt.long(),
        past_key_values=None,
        **prompts,
    )
    if grid is None:  # no image in the batch
        return slots.column.to(device)[None]
    # A reply starts one after the largest position of its prompt, in all three dimensions.
    last = grid.amax(0).masked_fill(~is_prompt, -1).amax(1)
    positions = slots.index.to(device) + (last + 1 - is_prompt.sum(1))[slots.row.to(device)]
    positions = positions.expand(3, 1, -1).clone()
    positions[:, 0, places[is_prompt]] = grid[:, is_prompt]
    return positions


def _prompt_places(slots: Packing) -> Tensor:
    """(B, P): where the tokens of the rows' prompts lie in the packed sequence; -1 for padding."""
    prompts = [segment for segment in slots.segments if segment.is_prompt]
    longest = max((segment.queries for segment in prompts), default=0)
    places = torch.full((int(slots.row.max()) + 1, longest), -1)
    for one in prompts:
        where = slots.target[one.sequence, one.first : one.end]
        places[slots.row[where[0]], : len(where)] = where
    return places


def _filler(config: PreTrainedConfig) -> int:
    """A token for padding that is no placeholder of an image."""
    return 0 if config.image_token_id != 0 else 1

"""How much memory a training needs on one device: arithmetic on counts of parameters, an estimate and no measurement.

Left out are what the allocator cannot use and kernels' workspaces: plan for a tenth more, and measure the first steps.
`benchmarks/memory/estimate_accuracy.py` compares it with trainings on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from trl_vlm.models.loading import is_adapted
from trl_vlm.models.parts import part_of
from trl_vlm.models.unsharded import unsharded_loading

GIB = 2**30
FLOAT32, BFLOAT16 = 4.0, 2.0
EIGHT_BIT = 1.0
FOUR_BIT = 0.5 + 4 / 64  # with one scale in float32 for 64 weights
_ADAPTER = FLOAT32  # PEFT makes adapters in float32, whatever the base is in
# TRL's fused head multiplies this many tokens by this many words of the vocabulary at once.
_HEAD_TOKENS, _HEAD_WORDS = 4096, 32768


class Counts(NamedTuple):
    """Numbers of parameters.

    Args:
        base: Without adapters.
        linear: Those of the base that loading in 4 or 8 bits quantizes.
        trained: Those of the base that train.
        adapter: Of adapters and of copies that train in full beside them (heads).
        tower: Whether anything of the vision tower trains.
    """

    base: int
    linear: int
    trained: int
    adapter: int = 0
    tower: bool = False


class Sharding(NamedTuple):
    """Among how many devices weights, gradients and optimizer states are split; ZeRO-2 splits the latter two."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @classmethod
    def of_stage(cls, stage: int, devices: int) -> "Sharding":
        """That of ZeRO's stage; 0 is DDP, and FSDP splits as stage 3 does."""
        return cls(*(devices if stage >= first else 1 for first in (3, 2, 1)))


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter.

    Args:
        weights: Of the base, unless it is quantized.
        linear: Of the base's quantized linear layers: `FOUR_BIT`, `EIGHT_BIT`; None if they are not quantized.
        states: Optimizer states per trained parameter: 2 for Adam, 0 for SGD.
        state_bytes: Bytes of one state; None: as the parameter's own.
        master: Whether the optimizer keeps 16-bit parameters in float32 as well, as DeepSpeed does.
    """

    weights: float
    linear: float | None = None
    states: int = 2
    state_bytes: float | None = None
    master: bool = False


class RoleMemory(NamedTuple):
    """Bytes on one device of one model of a run: policy, reference, critic, reward model."""

    name: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


class Activations(NamedTuple):
    """Bytes that a backward pass needs beside weights, gradients and optimizer states.

    Args:
        kept: By all layers, when it begins.
        layer: What one layer works with; with checkpointing also what it computes again.
    """

    kept: float
    layer: float = 0.0


class Memory(NamedTuple):
    """Bytes on one device.

    Args:
        roles: The models that are held at once.
        activations: What the largest backward pass keeps, when it begins.
        generation: Of the replies that are sampled at once, which are gone before a backward pass.
        layer: What one layer of it works with.
        accumulates: Whether there are gradients before a backward pass, of earlier micro-batches; else they come
            while the activations go.
        features: Image features that wait for further passes.
    """

    roles: Sequence[RoleMemory]
    activations: float
    generation: float = 0.0
    layer: float = 0.0
    accumulates: bool = True
    features: float = 0.0

    @property
    def total(self) -> float:
        """The peak: all models, and the larger of a backward pass and sampling."""
        gradients = sum(role.gradients for role in self.roles)
        at_rest = sum(role.total for role in self.roles) - gradients
        backward = gradients + self.layer
        backward = max(backward, self.activations + gradients * self.accumulates)
        return at_rest + self.features + max(backward, self.generation)

    def __str__(self) -> str:
        parts = [f"{role.name} {role.total / GIB:.1f}" for role in self.roles]
        parts.append(f"activations {self.activations / GIB:.1f}")
        if self.features:
            parts.append(f"image features {self.features / GIB:.1f}")
        if self.generation:
            parts.append(f"or keys and values of sampled replies {self.generation / GIB:.1f}")
        return f"{self.total / GIB:.1f} GiB ({', '.join(parts)})"


UNSHARDED = Sharding()


def held(name: str, counts: Counts, precision: Precision, sharding: Sharding = UNSHARDED) -> RoleMemory:
    """A frozen model: its weights alone."""
    return RoleMemory(name, (_base_bytes(counts, precision) + _ADAPTER * counts.adapter) / sharding.weights)


def trained(name: str, counts: Counts, precision: Precision, sharding: Sharding = UNSHARDED) -> RoleMemory:
    """A model that trains, with gradients and optimizer states of what trains in it."""
    gradients = precision.weights * counts.trained + _ADAPTER * counts.adapter
    states = _state_bytes(precision, precision.weights) * counts.trained
    states += _state_bytes(precision, _ADAPTER) * counts.adapter
    weights = held(name, counts, precision, sharding).weights
    return RoleMemory(name, weights, gradients / sharding.gradients, states / sharding.optimizer)


@dataclass(frozen=True)
class Layers:
    """Sizes of a stack of transformer layers.

    Args:
        count: How many there are.
        width: Of the hidden states.
        queries: Of all heads of queries together.
        keys: Of all heads of keys together.
        inner: Of the feed-forward part.
        gated: Whether the feed-forward part has a gate.
    """

    count: int
    width: int
    queries: int
    keys: int
    inner: int
    gated: bool = True

    @classmethod
    def of_text(cls, config: PreTrainedConfig) -> "Layers":
        """Those of a language model; of a mixture of experts, with those that a token passes through."""
        options = vars(config)
        heads = config.num_attention_heads
        head_size = options.get("head_dim") or config.hidden_size // heads
        inner = options.get("intermediate_size") or 4 * config.hidden_size
        if options.get("num_experts_per_tok") and options.get("moe_intermediate_size"):
            inner = options["num_experts_per_tok"] * options["moe_intermediate_size"]
        keys = head_size * (options.get("num_key_value_heads") or heads)
        return cls(config.num_hidden_layers, config.hidden_size, head_size * heads, keys, inner)

    @classmethod
    def of_tower(cls, config: PreTrainedConfig) -> "Layers | None":
        """Those of a vision tower; None if its configuration names its sizes in another way."""
        options = vars(config)
        width = options.get("embed_dim") or options.get("hidden_size")
        count = options.get("depth") or options.get("num_hidden_layers")
        inner = options.get("intermediate_size") or (width and int(width * options.get("mlp_ratio", 4)))
        if not isinstance(width, int) or not isinstance(count, int) or not isinstance(inner, int):
            return None
        return cls(count, width, width, width, inner, gated=False)

    def kept_per_token(self, value: float, training: "Training") -> float:
        """Bytes that a layer keeps of a token for its backward pass, if attention keeps no scores.

        Args:
            value: Bytes of a value.
            training: What trains in it.
        """
        norms = 2 * FLOAT32 * self.width  # computed in float32
        attention = value * (2 * self.queries + 2 * self.keys)
        feed_forward = value * (3 if self.gated else 1) * self.inner
        read = [self.width, self.width, self.inner]  # by queries, keys and values; by the gate; by what follows it
        if training is Training.ALL:
            return norms + attention + feed_forward + value * (2 * self.width + sum(read))
        if training is Training.SEVERAL_COPIES or training is Training.DROPOUT:
            read = [*[self.width] * 3, self.queries, *[self.width] * (2 if self.gated else 1), self.inner]
        mask = sum(read) if training is Training.DROPOUT else 0
        return norms + attention + feed_forward + value * sum(read) + mask

    def working_per_token(self, value: float) -> float:
        """Bytes that a layer works with for a token, in either direction, and that are gone after it."""
        return value * (2 * self.inner + 3 * self.width)


class Training(Enum):
    """What trains in a layer, and so which values it keeps."""

    ALL = "all weights"
    ADAPTERS = "adapters that read what the base reads"
    SEVERAL_COPIES = "adapters that read it in another precision, a copy each"
    DROPOUT = "adapters with dropout, a copy and a mask each"


def activations(
    layers: Layers,
    tokens: int,
    training: Training,
    *,
    checkpointing: bool,
    value: float = 2.0,
    passes: int = 1,
    copied: int = 0,
) -> Activations:
    """What the backward pass of one micro-batch needs of a stack of layers.

    Args:
        layers: The sizes.
        tokens: Of all sequences of the micro-batch, padding included.
        training: What trains in a layer.
        checkpointing: Whether layers are computed again, one at a time.
        value: Bytes of a value: 2 in 16 bits.
        passes: Forward passes that wait for one backward pass.
        copied: Tokens whose keys and values are copied, for replies that share a prompt.
    """
    one = tokens * layers.kept_per_token(value, training) + copied * value * 2 * layers.keys
    working = tokens * layers.working_per_token(value)
    if checkpointing:
        return Activations(passes * layers.count * tokens * value * layers.width + one + working, one + working)
    return Activations(passes * layers.count * one + working, working)


def head_bytes(config: PreTrainedConfig, tokens: int, value: float, trains: bool) -> float:
    """What TRL's fused head works with: logits of a part of the tokens and words, and gradients in float32.

    Args:
        config: Of the language model.
        tokens: Of all sequences of the micro-batch.
        value: Bytes of a value.
        trains: Whether the head's weights train.
    """
    logits = value * min(tokens, _HEAD_TOKENS) * min(config.vocab_size, _HEAD_WORDS)
    gradients = FLOAT32 * config.hidden_size * (tokens + (config.vocab_size if trains and value < FLOAT32 else 0))
    return logits + gradients


def keys_and_values(config: PreTrainedConfig, tokens: int, bytes_per_value: float = 2.0) -> float:
    """Bytes of the keys and values that generation keeps of sequences.

    Args:
        config: Of the language model.
        tokens: Of all sequences, padding included.
        bytes_per_value: 2 in 16 bits.
    """
    layers = Layers.of_text(config)
    return 2 * layers.count * layers.keys * tokens * bytes_per_value


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The generative model of a configuration, without weights (on the device `meta`).

    Whole under ZeRO-3, too, where a model is split while it is made: one process may count alone.

    Raises:
        ValueError: transformers knows no vision-language model for it.
    """
    with unsharded_loading(), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def counts_of(model: nn.Module) -> Counts:
    """The numbers of a model's parameters, on whatever device; what trains is what requires gradients."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    adapted = is_adapted(model)
    base = linear = trains = adapter = 0
    tower = False
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        tower = tower or (parameter.requires_grad and part_of(name) == "vision tower")
        if adapted and parameter.requires_grad:
            adapter += size
            continue
        base += size
        linear += size * (id(parameter) in linears)
        trains += size * parameter.requires_grad
    return Counts(base, linear, trains, adapter, tower)


def _base_bytes(counts: Counts, precision: Precision) -> float:
    if precision.linear is None:
        return precision.weights * counts.base
    return precision.linear * counts.linear + precision.weights * (counts.base - counts.linear)


def _state_bytes(precision: Precision, parameter: float) -> float:
    """Optimizer bytes per trained parameter of `parameter` bytes."""
    has_master = precision.master and parameter < FLOAT32
    state = FLOAT32 if has_master else parameter if precision.state_bytes is None else precision.state_bytes
    return precision.states * state + (FLOAT32 if has_master else 0.0)

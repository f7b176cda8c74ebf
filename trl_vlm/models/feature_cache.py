"""Features of images that are computed once, and kept for every model, pass and epoch that reads them.

In PPO with LoRA an image goes through the vision tower when the policy replies, when reference, old policy, critic and
reward model score the reply, and twice in each pass over the rollout. Where tower and projector are frozen and have
no adapter, all of these give the same features. `cache_image_features(model, store)` puts a store around the
`get_image_features` of the model's backbone, the one method through which transformers encodes images, in `forward`
and in `generate`. Models whose towers hold the same numbers may use one store, and then encode an image once for all.

An image is known by its pixels, in the precision in which the tower reads them, with its grid or size; features are
kept up to a limit in bytes. A tower that trains, or gets an adapter, is asked each time; when its weights change, what
they gave before is not used again.

Processes that hold parts of a tower (ZeRO-3, FSDP2) must run it together. They do where one of them misses an image,
and take what they have where none does (`FeatureStore.in_split_towers`); elsewhere such a tower encodes each time.

The images of a call that are not in the store are encoded together. A matrix product may round otherwise for
another number of rows, so features can differ in their last digits from those of the whole batch.
"""

import functools
import inspect
import itertools
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel

from trl_vlm.models.families import family_of
from trl_vlm.models.feature_store import Features, FeatureStore, Output
from trl_vlm.models.image_calls import ImageCall, Key
from trl_vlm.models.parts import part_of

logger = logging.getLogger(__name__)

_METHOD = "get_image_features"
_TOWER = "_image_tower"  # where a backbone holds its `_Tower`
# What draws at random in the attention and the residual branches of a tower in training mode, as numbers.
_DROPOUTS = ("dropout", "attention_dropout", "drop_prob")
# Of a configuration: what heads, tokens and files have of their own.
_NOT_OF_IMAGES = {
    *("text_config", "architectures", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("num_labels", "id2label", "label2id", "problem_type", "use_cache", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "tie_word_embeddings"),
}


class _Encoder(Protocol):
    """`get_image_features` of a family."""

    def __call__(self, *args: Any, **kwargs: Any) -> Output: ...


def cache_image_features(
    model: PreTrainedModel,
    store: FeatureStore,
    *,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    is_split: bool = False,
) -> None:
    """Lets a model take the features of images that were encoded before from a store.

    Args:
        model: With any head; a PEFT model gives its `get_base_model()`.
        store: May serve several models.
        precision: A context in which it encodes, wherever it is called: autocast, which `generate` of a PEFT model
            does without.
        is_split: Whether each process holds a part of its weights.

    Raises:
        ValueError: The model's images are not encoded alike each time, or its family is not known.
    """
    reason = why_not_cached(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} must encode its images each time: {reason}.")
    backbone = cast(PreTrainedModel, model.base_model)
    tower = _Tower(backbone, store, precision, is_split)
    signature_of = getattr(type(backbone), _METHOD)

    def get_image_features(backbone: PreTrainedModel, *args: Any, **kwargs: Any) -> Output:
        return vars(backbone)[_TOWER].features(backbone, args, kwargs)

    # `generate` passes what the signature names.
    get_image_features.__wrapped__ = signature_of  # pyright: ignore[reportFunctionMemberAccess]  as functools.wraps
    vars(backbone)[_TOWER] = tower
    # A method, so that a deep copy of the model calls its own tower.
    vars(backbone)[_METHOD] = types.MethodType(get_image_features, backbone)


def stop_caching(model: PreTrainedModel) -> None:
    """Undoes `cache_image_features`, on a model that an earlier run has left with its store."""
    attributes = vars(model.base_model)
    if _TOWER in attributes:
        del attributes[_TOWER], attributes[_METHOD]


def encodes_images(model: PreTrainedModel) -> bool:
    """Whether a model has the method through which images are encoded."""
    return hasattr(type(model.base_model), _METHOD)


def why_not_cached(model: PreTrainedModel) -> str | None:
    """Why a model encodes its images each time, as one sentence; None if their features can be kept."""
    kind = model.config.model_type
    if not encodes_images(model):
        return f"{kind} has no `{_METHOD}`"
    if not family_of(model.config).shares_prefix:
        return f"{kind} is not among the families whose images are tested to be encoded apart from each other"
    names = _part_names(model.base_model)
    if not names:
        return f"no parameter of {kind} belongs to a vision tower that is known by name"
    return _why_not_alike(_parts(model.base_model, names))


def _why_not_alike(parts: Sequence[nn.Module | nn.Parameter]) -> str | None:
    """Why tower and projector do not give the same features each time and in all roles."""
    for part in parts:
        if isinstance(part, nn.Parameter):
            if part.requires_grad:
                return "its projector trains"
            continue
        for name, module in part.named_modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                return (
                    f"an adapter stands on its vision tower or projector ({name or type(module).__name__}); "
                    '`target_modules="language-model"` leaves both alone'
                )
            if _draws(module):
                return f"its vision tower or projector has dropout ({name}), which draws again each time"
            if isinstance(module, _BatchNorm):
                return f"its vision tower normalizes over the batch ({name})"
        trained = next((name for name, parameter in part.named_parameters() if parameter.requires_grad), None)
        if trained is not None:
            return f"its vision tower or projector trains ({trained})"
    return None


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    numbers = (vars(module).get(name) for name in _DROPOUTS)
    return any(isinstance(number, float) and number > 0 for number in numbers)


def _part_names(module: nn.Module, prefix: str = "") -> list[str]:
    """The largest modules, and single parameters, of which all is vision tower or projector."""
    found = [prefix + name for name, _ in module.named_parameters(recurse=False) if _is_image_part(prefix + name)]
    for name, child in module.named_children():
        are = [_is_image_part(f"{prefix}{name}.{inner}") for inner, _ in child.named_parameters()]
        if are and all(are):
            found.append(prefix + name)
        elif any(are):
            found += _part_names(child, f"{prefix}{name}.")
    return found


def _is_image_part(name: str) -> bool:
    return part_of(name) in ("vision tower", "projector")


def _parts(backbone: nn.Module, names: Sequence[str]) -> list[nn.Module | nn.Parameter]:
    """Modules and parameters by their names."""
    found = []
    for name in names:
        owner, _, last = name.rpartition(".")
        found.append(getattr(backbone.get_submodule(owner), last))
    return found


class _Tower:
    """Vision tower and projector of a backbone, and where their features are kept.

    Args:
        backbone: That holds them.
        store: For their features.
        precision: A context in which they encode.
        is_split: Whether each process holds a part of the weights, which then cannot be compared.

    Attributes:
        number: Of their weights, the same for towers with the same weights in one store; 0 before the first use.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        store: FeatureStore,
        precision: Callable[[], AbstractContextManager[Any]],
        is_split: bool,
    ):
        self.store = store
        self.number = 0
        self._precision, self._is_split = precision, is_split
        self._backbone = weakref.ref(backbone)
        self._names = _part_names(backbone)
        self._weights: list[tuple[int, int]] | None = None
        self._is_off = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tower":
        copied = _Tower.__new__(_Tower)  # of a model that may be changed in any way: it encodes each time
        vars(copied).update(vars(self) | {"_is_off": True, "store": FeatureStore(0)})
        return copied

    def features(self, backbone: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Output:
        """What `get_image_features` of the backbone's class returns for these arguments."""
        encode = cast(_Encoder, types.MethodType(getattr(type(backbone), _METHOD), backbone))
        is_each_time = self._is_split and self.store.in_split_towers == "encode"
        if is_each_time or _why_not_alike(_parts(backbone, self._names)) is not None:
            return encode(*args, **kwargs)
        call = None if self._is_off else ImageCall.of(_by_name(encode, args, kwargs))
        # Features are constants; those made in inference mode could not be read where gradients are made.
        with torch.inference_mode(False), torch.no_grad(), self._precision():
            keys = [] if call is None else self._keys(call, backbone.config)
            found = {key: self.store.find(key) for key in dict.fromkeys(keys)}
            is_complete = call is not None and None not in found.values()
            if self._is_split and self.store.in_split_towers == "agree":
                others_miss = _on_any_process(not is_complete, args, kwargs)
                if call is not None and is_complete and others_miss:
                    encode(**call.part([0]))  # for those that miss an image: they wait for all parts of the weights
            if call is not None:
                output = self._read(call, keys, found, encode, functools.partial(encode, *args, **kwargs))
                if output is not None:
                    return output
                self._turn_off(type(backbone).__name__)
        return encode(*args, **kwargs)

    def _keys(self, call: ImageCall, config: PreTrainedConfig) -> list[Key]:
        """What is known of each group of images: the same if its features are."""
        self._number_weights()
        device = call.images[0]["pixel_values"].device
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else self._dtype()
        return [(self.number, str(device), is_autocast, dtype, *key) for key in call.contents(config, dtype)]

    def _dtype(self) -> torch.dtype | None:
        """In which the weights are, if not in integers that stand for other numbers."""
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), None)

    def _read(
        self,
        call: ImageCall,
        keys: Sequence[Key],
        found: dict[Key, Features | None],
        encode: _Encoder,
        encode_call: Callable[[], Output],
    ) -> Output | None:
        """The features under `keys`, of which those that were not `found` are encoded; None if they have another form.

        Args:
            call: The images.
            keys: Of its groups.
            found: What is kept under them; what is missing is added.
            encode: Encodes some of the images.
            encode_call: Encodes all of them, as the model has asked.
        """
        missing = [key for key, features in found.items() if features is None]
        if missing:
            is_whole = len(missing) == len(keys)
            chosen = [keys.index(key) for key in missing]
            output = encode_call() if is_whole and not call.by_row else encode(**call.part(chosen))
            made = _taken_apart(output, [len(call.groups[number]) for number in chosen])
            if made is None:
                return None
            for key, features in zip(missing, made, strict=True):
                self.store.keep(key, features)
                found[key] = features
            if is_whole:
                return output
        return _together([cast(Features, found[key]) for key in keys])

    def is_current(self) -> bool:
        """Whether the weights are those that have the number."""
        return self._weights is not None and self._weights == self._state()

    def equals(self, other: "_Tower") -> bool:
        """Whether both give the same features, to the last digit."""
        one, another = self._backbone(), other._backbone()
        if one is None or another is None or type(one) is not type(another):
            return False
        own, others = self._tensors(), other._tensors()
        if any(tensor.dtype in (torch.uint8, torch.int8) for tensor in own):
            return False  # scales of quantized weights are no parameters
        return (len(own), _settings(one)) == (len(others), _settings(another)) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(own, others, strict=True)
        )

    def _number_weights(self) -> None:
        """Gives the weights a number, and a new one where they have changed since the last call."""
        if self._is_split:  # what this process holds of them changes all the time
            self.number = self.number or self.store.new_number()
            return
        if self.is_current():
            return
        if self._weights is not None:
            self.store.clear()  # nobody asks for the old features again
        self._weights = self._state()
        self.number = self.store.number_of(self)

    def _tensors(self) -> list[Tensor]:
        backbone = self._backbone()
        assert backbone is not None  # it calls
        found: list[Tensor] = []
        for part in _parts(backbone, self._names):
            found += [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]
        return found

    def _state(self) -> list[tuple[int, int]]:
        """What changes whenever weights are written to, or replaced; torch counts the writes in `_version`."""
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors()]

    def _turn_off(self, name: str) -> None:
        self._is_off = True
        logger.warning("%s encodes its images each time: it does not give one entry of features per image.", name)


def _by_name(encode: _Encoder, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    arguments = dict(inspect.signature(encode).bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})


def _on_any_process(here: bool, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether something is true on one process at least; all of them ask, with the arguments of a call."""
    if not torch.distributed.is_initialized():
        return here
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    agreed = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    return bool(agreed)


def _settings(backbone: PreTrainedModel) -> tuple[object, object]:
    """What decides on features beside the weights."""
    attention = getattr(getattr(backbone.config, "vision_config", None), "_attn_implementation", None)
    return _of_images(backbone.config.to_dict()), attention


def _of_images(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _of_images(value) for name, value in settings.items() if name not in _NOT_OF_IMAGES}


def _taken_apart(output: Output, sizes: Sequence[int]) -> list[Features] | None:
    """The features of groups of these numbers of images; None if there is not one entry per image."""
    pooled = output.pooler_output
    # getattr: the output of Qwen3-VL alone has them.
    layers = [pooled, *(getattr(output, "deepstack_features", None) or ())]
    if any(len(layer) != sum(sizes) for layer in layers):
        return None
    ends = [0, *itertools.accumulate(sizes)]
    return [
        Features(
            type(output), isinstance(pooled, Tensor), [list(layer[start:end]) for layer in layers], layers[0][0].device
        )
        for start, end in itertools.pairwise(ends)
    ]


def _together(features: Sequence[Features]) -> Output:
    """The output with the features of all groups."""
    first = features[0]
    layers = [list(itertools.chain(*layer)) for layer in zip(*(each.layers for each in features), strict=True)]
    parts: dict[str, object] = {"pooler_output": torch.stack(layers[0]) if first.stacked else layers[0]}
    if layers[1:]:
        parts["deepstack_features"] = layers[1:]
    return first.kind(**parts)

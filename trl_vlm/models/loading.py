"""Loading a generative model from a folder or the hub, whether it holds all weights or a PEFT adapter."""

from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import find_adapter_config_file

from trl_vlm.models import _transformers
from trl_vlm.models.processors import load_processor

if TYPE_CHECKING:
    from peft import PeftModel


def is_adapted(model: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether PEFT's wrapper is around a model."""
    # hasattr: importing peft for an isinstance takes seconds, which a model without adapters can spare.
    return hasattr(model, "get_base_model")


def moved(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    """The model, on a device."""
    # The stub of the wrapped method takes the device for the model.
    return model.to(device)  # pyright: ignore[reportArgumentType, reportReturnType]


def load_generative_model(path: str | PathLike, **kwargs: Any) -> PreTrainedModel:
    """The vision-language model of `path`; an adapter comes with its base model.

    Args:
        path: Folder or hub id, with all weights or a PEFT adapter.
        kwargs: Passed to `from_pretrained` (`dtype`, `quantization_config`, `device_map`, ...).

    Raises:
        ValueError: The base model of an adapter cannot be loaded.
    """
    hub = _transformers.hub_arguments(kwargs)
    base = base_of(path, **hub)
    if base is None:
        return AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    from peft import PeftModel

    try:
        model = AutoModelForImageTextToText.from_pretrained(base, **without_place(kwargs))
    except OSError as error:
        raise ValueError(
            f"{path} is an adapter of the model {base!r}, which cannot be loaded from there. Put it back, or correct "
            "`base_model_name_or_path` in the adapter's adapter_config.json."
        ) from error
    # PEFT's wrapper forwards attributes of the model inside.
    return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(path), **hub))


def model_without_weights(path: str | PathLike) -> PreTrainedModel:
    """The vision-language model of `path` on the device `meta`: its class, configuration and generation settings.

    Args:
        path: Folder or hub id of a model with all weights.
    """
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with suppress(OSError):  # not every model comes with a generation_config.json
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def load_generative_processor(path: str | PathLike, **kwargs: Any) -> ProcessorMixin:
    """The processor of `path`; of an adapter that was saved without one, that of its base model.

    Args:
        path: As for the model.
        kwargs: As for the model; those that say where files come from count.
    """
    hub = _transformers.hub_arguments(kwargs)
    try:
        return load_processor(path, **hub)
    except (OSError, ValueError):  # no processor file, and no model config that names its class
        base = base_of(path, **hub)
        if base is None:
            raise
        return load_processor(base, **without_place(hub))


def without_place(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the base of an adapter, without those that locate the adapter itself."""
    return {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}


def base_of(path: str | PathLike, **hub: Any) -> str | None:
    """Where the base model of an adapter lies; None if `path` is no adapter."""
    place = Path(path, hub.get("subfolder") or "")
    if place.is_dir():  # transformers looks into a subfolder of a repository, and not of a folder on disk
        path, hub = place, {name: value for name, value in hub.items() if name != "subfolder"}
    if find_adapter_config_file(str(path), **hub) is None:
        return None
    # Importing peft imports bitsandbytes and torch's compiler: many seconds that a model without adapter can spare.
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(str(path), **hub).base_model_name_or_path)

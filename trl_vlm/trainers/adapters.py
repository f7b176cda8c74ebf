"""PEFT configurations for vision-language models: presets, excluded parts, a head."""

import copy
import logging
import re
from collections.abc import Iterator
from typing import overload

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_vlm.models.parts import Part, part_of
from trl_vlm.models.unsharded import unsharded_loading
from trl_vlm.trainers.preparation import Arguments, config_of, loading_arguments
from trl_vlm.trainers.types import Model

logger = logging.getLogger(__name__)

VISION_TOWER: Part = "vision tower"

# Presets for `LoraConfig.target_modules` that never reach the vision tower, by the parts that they do reach.
LORA_PRESETS: dict[str, set[Part]] = {
    "language-model": {"language model"},
    "language-model-and-projector": {"language model", "projector"},
}


@overload
def complete_peft_config(peft_config: None, model: str | Model, args: Arguments) -> None: ...
@overload
def complete_peft_config(peft_config: PeftConfig, model: str | Model, args: Arguments) -> PeftConfig: ...
@overload
def complete_peft_config(peft_config: PeftConfig | None, model: str | Model, args: Arguments) -> PeftConfig | None: ...
def complete_peft_config(peft_config: PeftConfig | None, model: str | Model, args: Arguments) -> PeftConfig | None:
    """The adapter's configuration with presets expanded, and without the vision tower if that is to be frozen.

    Args:
        peft_config: The user's, not modified.
        model: The model that it is for, or its folder or hub id.
        args: The configuration.
    """
    if peft_config is None:
        return None
    preset = _preset(peft_config)
    completed = copy.deepcopy(peft_config)  # PEFT writes what "all-linear" has matched into it
    if preset is not None:
        assert isinstance(completed, LoraConfig)
        completed.target_modules = lora_targets(_shell(model, args), preset)
    elif args.freeze_vision_tower:
        completed = sparing_vision_tower(completed, _shell(model, args))
    return completed


def _preset(peft_config: PeftConfig) -> str | None:
    """The preset that `target_modules` names, if it names one."""
    targets = peft_config.target_modules if isinstance(peft_config, LoraConfig) else None
    if isinstance(targets, list | set) and len(targets) == 1:
        (targets,) = targets  # as a command line passes it
    return targets if isinstance(targets, str) and targets in LORA_PRESETS else None


def lora_targets(model: nn.Module, preset: str = "language-model") -> list[str]:
    """Names of the linear layers that a preset of `LORA_PRESETS` reaches: none of the vision tower, nor the head."""
    if preset not in LORA_PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(LORA_PRESETS)}.")
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    parts = {
        name: part_of(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    targets = [name for name, part in parts.items() if part in LORA_PRESETS[preset]]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer of the {preset}. Name `target_modules` yourself."
        )
    if "projector" in LORA_PRESETS[preset] - set(parts.values()):
        logger.warning(
            "`target_modules=%r` adds no adapter to the projector of %s, where no linear layer is known as part of "
            "it. To train the projector in full, name its module in `modules_to_save` of the LoraConfig.",
            preset,
            type(model).__name__,
        )
    return targets


def classifier_adapter(peft_config: PeftConfig) -> PeftConfig:
    """The configuration for a model with a reward or value head: a sequence classifier whose head trains in full.

    The head is new and cannot be adapted; without `modules_to_save` it would stay random and not be saved.
    """
    peft_config = copy.deepcopy(peft_config)
    if peft_config.task_type not in (None, TaskType.SEQ_CLS, TaskType.CAUSAL_LM):
        logger.warning("`peft_config.task_type` is %s; a reward model needs SEQ_CLS.", peft_config.task_type)
    peft_config.task_type = TaskType.SEQ_CLS
    peft_config.inference_mode = False
    options = vars(peft_config)
    if "modules_to_save" in options:
        kept = set(options["modules_to_save"] or ()) - {"lm_head"}
        options["modules_to_save"] = sorted({*kept, "score"})
    return peft_config


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """The model with a new adapter, in float32 where the backend allows two precisions in one model.

    ZeRO-3 gathers parameters into a buffer of one dtype; TRL makes the policy's adapter for it in the same way.
    """
    return get_peft_model(model, peft_config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())


def sparing_vision_tower(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The configuration with no adapter on the vision tower, whatever its `target_modules` match.

    Raises:
        ValueError: The kind of adapter has no `exclude_modules`.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"`freeze_vision_tower` cannot keep a {type(peft_config).__name__} off the vision tower. "
            "Use a LoraConfig, or name only modules of the language model in `target_modules` and unset the option."
        )
    peft_config = copy.deepcopy(peft_config)
    excluded = peft_config.exclude_modules or []
    patterns = [excluded] if isinstance(excluded, str) else [rf"(.*\.)?{re.escape(name)}" for name in excluded]
    patterns += [rf"{re.escape(name)}(\..*)?" for name in _roots(model, VISION_TOWER)]
    peft_config.exclude_modules = "|".join(f"({pattern})" for pattern in patterns) or None
    return peft_config


def _roots(module: nn.Module, part: Part, prefix: str = "") -> Iterator[str]:
    """Names of the largest modules all of whose parameters belong to `part`."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        parts = {part_of(f"{path}.{parameter}") for parameter, _ in child.named_parameters()}
        if parts == {part}:
            yield path
        elif part in parts:
            yield from _roots(child, part, f"{path}.")


def _shell(model: str | Model, args: Arguments) -> nn.Module:
    """The model, or for a name one of the same layers without weights."""
    if not isinstance(model, str):
        return model
    config = config_of(model, **loading_arguments(model, args))
    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    # ZeRO-3 would split it among the processes, and initialize weights that it does not have.
    with torch.device("meta"), unsharded_loading():
        return auto.from_config(config, trust_remote_code=args.trust_remote_code)

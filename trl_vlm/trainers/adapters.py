"""What a PEFT configuration needs before it may wrap a vision-language model."""

import copy
import logging
import re
from collections.abc import Iterator

from peft import LoraConfig, PeftConfig, TaskType
from torch import nn

from trl_vlm.models.parts import part_of

logger = logging.getLogger(__name__)

VISION_TOWER = "vision tower"


def reward_adapter(peft_config: PeftConfig) -> PeftConfig:
    """Returns the configuration for a model with a reward head: a sequence classifier whose head is trained in full.

    The head is new and cannot be adapted; without `modules_to_save` it would stay random and not be saved.
    """
    peft_config = copy.deepcopy(peft_config)
    if peft_config.task_type != TaskType.SEQ_CLS:
        if peft_config.task_type is not None:
            logger.warning("`peft_config.task_type` is %s; a reward model needs SEQ_CLS.", peft_config.task_type)
        peft_config.task_type = TaskType.SEQ_CLS
    if isinstance(peft_config, LoraConfig):
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), "score"})
    return peft_config


def sparing_vision_tower(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Returns the configuration with no adapter on the vision tower, whatever its `target_modules` match.

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


def _roots(module: nn.Module, part: str, prefix: str = "") -> Iterator[str]:
    """Names of the largest modules all of whose parameters belong to `part`."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        parts = {part_of(f"{path}.{parameter}") for parameter, _ in child.named_parameters()}
        if parts == {part}:
            yield path
        elif part in parts:
            yield from _roots(child, part, f"{path}.")

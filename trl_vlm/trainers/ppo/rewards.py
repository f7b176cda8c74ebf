"""The reward functions that PPO passes to TRL."""

from typing import Any, cast

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_vlm.rewards import RewardModelReward, checked
from trl_vlm.trainers.ppo.token_rewards import TokenRewards
from trl_vlm.trainers.preparation import config_of
from trl_vlm.trainers.types import Model, Processor, RewardFunction


def reward_functions(
    given: RewardFunction | list[RewardFunction] | None,
    reward_model: str | Model | None,
    processor: Processor,
    load_options: dict[str, Any],
    token_rewards: TokenRewards,
) -> list[RewardFunction]:
    """TRL reward functions that raise for invalid rewards, `reward_model` last.

    A vision-language reward model becomes a `RewardModelReward`: TRL would show it the text alone.

    Args:
        given: The reward functions, as in TRL.
        reward_model: One more, or None.
        processor: The policy's, for a reward model that is loaded already.
        load_options: For a vision-language reward model that is named: precision, quantization, ...
        token_rewards: Keeps what functions give to single tokens.
    """
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    functions += [] if reward_model is None else [reward_model]
    if not functions:
        raise ValueError("PPO has no reward: pass `reward_funcs`, `reward_model`, or both.")
    functions = [_seeing(function, processor, load_options) for function in functions]
    return [checked(token_rewards.summed(function, place)) for place, function in enumerate(functions)]


def load_options_of_rewards(
    model: str | Model, others: dict[str, Any], quantization_config: BitsAndBytesConfig | None
) -> dict[str, Any]:
    """How reward models are loaded: in the policy's precision, as TRL does, and quantized as it is.

    Args:
        model: The policy, or its folder or hub id.
        others: `model_init_kwargs` without the policy's revision.
        quantization_config: The trainer's argument.
    """
    # TRL loads a policy by name in float32 by default.
    options = {"dtype": torch.float32 if isinstance(model, str) else model.dtype, **others}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return options


def _seeing(function: RewardFunction, processor: Any, load_options: dict[str, Any]) -> RewardFunction:
    if isinstance(function, str):
        sees = hasattr(config_of(function, **load_options), "vision_config")
        return RewardModelReward(function, **load_options) if sees else function
    if isinstance(function, PreTrainedModel | PeftModel) and hasattr(function.config, "vision_config"):
        # PEFT's wrapper forwards all attributes of the model inside.
        return RewardModelReward(cast(PreTrainedModel, function), processor=processor)
    return function

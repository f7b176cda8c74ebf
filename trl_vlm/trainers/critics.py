"""Where PPO's critic comes from."""

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_vlm.models.critic import copy_backbone_, zero_head_
from trl_vlm.models.reward_model import load_reward_model, reward_model_class


def make_critic(
    policy: nn.Module,
    *,
    value_model: str | PreTrainedModel | PeftModel | None,
    reward_model: str | PreTrainedModel | PeftModel | None,
    peft_config: PeftConfig | None,
    head_init: str,
    seed: int,
    load_options: dict[str, Any],
) -> nn.Module:
    """The critic that PPO trains: a sequence classifier with one label, read at every token.

    It is `value_model` if given, else a copy of `reward_model`, else a copy of the policy's backbone under a new head.

    Args:
        policy: the policy, possibly with PEFT adapters; it is left as it is.
        value_model: folder, hub id or model.
        reward_model: folder, hub id or model; a model is copied, since the reward must not train.
        peft_config: adapters to train; without any the critic trains in full. Ignored if it has adapters already.
        head_init: `zero` or `trained`. A value model that is passed as a model keeps its head.
        seed: for the adapters' initial weights, so that every process draws the same ones.
        load_options: passed to `from_pretrained`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(value_model, nn.Module):
            critic = value_model
        else:
            critic = _new_critic(policy, value_model, reward_model, head_init, load_options)
            if head_init == "zero":
                zero_head_(critic)
        if peft_config is not None and not isinstance(critic, PeftModel):
            critic = get_peft_model(critic, for_values(peft_config))
    if isinstance(critic, PeftModel):
        critic.set_adapter(critic.active_adapter)
    return critic


def for_values(config: PeftConfig) -> PeftConfig:
    """The policy's adapter configuration, for a classifier: its head trains and is saved with the adapter."""
    config = copy.deepcopy(config)
    config.task_type = TaskType.SEQ_CLS
    kept = [name for name in getattr(config, "modules_to_save", None) or [] if name != "lm_head"]
    config.modules_to_save = sorted({*kept, "score"})
    return config


def _new_critic(
    policy: nn.Module,
    value_model: str | None,
    reward_model: str | PreTrainedModel | PeftModel | None,
    head_init: str,
    load_options: dict[str, Any],
) -> nn.Module:
    source = value_model or reward_model
    if isinstance(source, str):
        return load_reward_model(source, for_scoring=head_init == "trained", **load_options)
    if source is not None:
        return copy.deepcopy(source).requires_grad_(True)
    if head_init == "trained":
        raise ValueError(
            "`value_head_init='trained'` keeps the head of a reward model, but there is neither a `reward_model` nor "
            "a `value_model`. Pass one, or use `value_head_init='zero'`."
        )
    return _from_policy(policy)


def _from_policy(policy: nn.Module) -> PreTrainedModel:
    """A classifier of the policy's family with the weights of its backbone, adapters merged in."""
    if isinstance(policy, PeftModel):
        # On a copy: merging changes weights, and the policy goes on training.
        policy = copy.deepcopy(policy).merge_and_unload()
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if hasattr(config, "vision_config"):
        classifier = reward_model_class(config)(config)
    else:
        classifier = AutoModelForSequenceClassification.from_config(config)
    copy_backbone_(classifier, policy)
    return classifier.to(dtype=policy.dtype, device=policy.device)

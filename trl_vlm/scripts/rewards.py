"""Rewards of the scripts that sample replies: a reward model's folder or address, functions by their name."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from trl_vlm import GRPOTrainer, RLOOTrainer
from trl_vlm.rewards import RemoteReward, RewardModelReward
from trl_vlm.scripts.arguments import ScriptArguments, model_arguments, refusals
from trl_vlm.scripts.inputs import check_model
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.trainers.types import RewardFunction


@dataclass
class ServedArguments(ScriptArguments):
    """Options of a script that may ask a reward server."""

    # What the server says that it serves, since that shapes the result and its address does not.
    served: dict[str, Any] | None = field(default=None, init=False)

    def further_settings(self) -> dict[str, Any]:
        """As in `ScriptArguments`: the model that the reward server has."""
        return {} if self.served is None else {"reward served": self.served}


@dataclass
class RolloutArguments(ServedArguments):
    """Options of the reward."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of a reward model that reads images and facts (`trl_vlm.scripts.reward`)."
        },
    )
    reward_server: str | None = field(
        default=None,
        metadata={"help": "Address of a reward model that `trl-vlm serve-reward` serves, such as http://gpu-7:8100."},
    )
    reward_server_key_variable: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the reward server's key. Without it no key is sent."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further TRL reward functions, as `module.name`; modules in the working directory are found."
        },
    )


def train_with_rewards(
    trainer: type[GRPOTrainer | RLOOTrainer], parser: TrlParser, arguments: Sequence[str] | None
) -> None:
    """Trains with a method of TRL that needs nothing but rewards.

    Args:
        trainer: The method's trainer.
        parser: The script's options: `RolloutArguments`, the trainer's, the model's.
        arguments: As for the script.
    """
    script, training, model = options_of(parser, arguments)
    check_rewards(script)
    job = prepared(script, training, model, purpose="ppo", unit="replies")
    if job is None:
        return
    rewards = rewards_of(script, batch_size=training.per_device_train_batch_size, **model_arguments(model))
    job.train(trainer(job.model_name, reward_funcs=rewards, processing_class=job.processor, **job.trainer_arguments))


def check_rewards(script: RolloutArguments) -> None:
    """Ends the program with a message if there is no reward, or it cannot be found."""
    with refusals():
        if script.reward_model_name_or_path is None and script.reward_server is None and not script.reward_funcs:
            raise ValueError(
                "There is no reward: give `--reward_model_name_or_path` (a reward model's folder) or "
                "`--reward_server` (its address), `--reward_funcs` (functions as module.name), or both."
            )
        if script.reward_model_name_or_path is not None and script.reward_server is not None:
            raise ValueError(
                "`--reward_model_name_or_path` and `--reward_server` cannot be combined: each is the reward model. "
                "Give one of them."
            )
        if script.reward_server is not None:
            script.served = _server(script).served()
        if script.reward_model_name_or_path is not None:
            check_model(script.reward_model_name_or_path, "reward_model_name_or_path")
        for name in script.reward_funcs or ():
            function_named(name)


def rewards_of(script: RolloutArguments, **options: Any) -> list[RewardFunction]:
    """The reward functions that the options name.

    Args:
        script: The options.
        options: Arguments of `RewardModelReward`, such as `batch_size` and `dtype`.
    """
    rewards: list[RewardFunction] = []
    if script.reward_model_name_or_path is not None:
        rewards.append(RewardModelReward(script.reward_model_name_or_path, **options))
    if script.reward_server is not None:
        rewards.append(_server(script))
    return rewards + [function_named(name) for name in script.reward_funcs or ()]


def _server(script: RolloutArguments) -> RemoteReward:
    assert script.reward_server is not None
    return RemoteReward(script.reward_server, key_variable=script.reward_server_key_variable)


def function_named(name: str) -> RewardFunction:
    """The function `module.name`; modules in the working directory are found.

    Raises:
        ValueError: There is no such module or function.
    """
    module, _, function = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`--reward_funcs` names {name!r}, which cannot be found ({error}). Write module.name."
        ) from error

"""Rewards of single tokens: TRL gets their sum for each reply, and PPO puts them where they belong."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from trl_vlm.rewards.checks import finite_reward, reward_name, wrapped
from trl_vlm.rewards.replies import RewardFunction, name_row

Scorer = TypeVar("Scorer")  # whatever TRL takes as a reward function


class TokenRewards:
    """What the reward functions of a rollout gave to single tokens of this process's replies.

    A reward function may return, in the place of a reply's number, a list with one number for each of its tokens
    (`completion_ids`).
    """

    def __init__(self) -> None:
        # By the place of the function, for each reply; None where it gave one number, or none.
        self._lists: dict[int, list[list[float] | None]] = {}

    def summed(self, reward_func: Scorer, place: int) -> Scorer:
        """The reward function with the sum of a list in its place, as TRL takes it.

        Args:
            reward_func: A TRL reward function that may return lists. What TRL also takes in its place, a model or its
                name, comes back unchanged.
            place: Its place among the reward functions.
        """
        if isinstance(reward_func, str | nn.Module) or not callable(reward_func):
            return reward_func
        function = cast(RewardFunction, reward_func)
        return cast(Scorer, wrapped(function, partial(self._sums, place, reward_name(function))))

    def _sums(
        self, place: int, name: str, values: Iterable[object], completions: Sequence, row_name: Sequence[str] | None
    ) -> Any:
        self._lists[place] = []
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            return values  # without lists, or wrong: `checked` says so
        sums: list[object] = []
        for row, value in enumerate(values):
            numbers = None
            if isinstance(value, list | tuple):
                where = f"a token of {name_row(row, completions[row], row_name)}"
                numbers = [finite_reward(number, name, where) or 0.0 for number in value]
            self._lists[place].append(numbers)
            sums.append(value if numbers is None else float(sum(numbers)))
        return sums

    def taken(
        self, completion_ids: Sequence[Sequence[int]], weights: Tensor, names: Sequence[str], functions: Sequence[str]
    ) -> Tensor | None:
        """The weighted sum of all lists since the last call, (B, T) in float32; None if there are none.

        Args:
            completion_ids: The replies' tokens, T at most.
            weights: Of the reward functions.
            names: Of the rows.
            functions: Names of the reward functions.

        Raises:
            ValueError: A list has another number of values than its reply has tokens.
        """
        lists, self._lists = self._lists, {}
        if not any(tokens is not None for per_reply in lists.values() for tokens in per_reply):
            return None
        placed = torch.zeros(len(completion_ids), max(map(len, completion_ids)), device=weights.device)
        for place, per_reply in lists.items():
            for row, tokens in enumerate(per_reply):
                if tokens is None:
                    continue
                if len(tokens) != len(completion_ids[row]):
                    raise ValueError(
                        f"the reward function `{functions[place]}` returned {len(tokens)} values for the "
                        f"{len(completion_ids[row])} tokens of {names[row]}. Return one for each of `completion_ids`, "
                        "or a number for the whole reply."
                    )
                placed[row, : len(tokens)] += weights[place] * torch.tensor(tokens, device=placed.device)
        return placed

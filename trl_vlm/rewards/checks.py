"""Reward functions that fail loudly: wrong counts and non-finite values name the function, the row and the reply."""

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any, TypeVar, cast

import torch

from trl_vlm.data.rows import ROW_NAME
from trl_vlm.rewards.replies import RewardFunction, name_row

# What TRL takes as a reward function.
_Scorer = TypeVar("_Scorer", bound=Callable | torch.nn.Module | str)


def reward_name(reward_func: Callable) -> str:
    """The name under which TRL logs a reward function: its `__name__`, or that of its class."""
    while isinstance(reward_func, partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def is_asynchronous(reward_func: Callable) -> bool:
    """Whether calling the function returns a coroutine: an `async` function, or an object with an `async` call."""
    while isinstance(reward_func, partial):
        reward_func = reward_func.func
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__)


def finite_rewards(
    values: Iterable[object], name: str, completions: Sequence, row_name: Sequence[str] | None = None
) -> list[float | None]:
    """A reward function's output as a list of finite numbers; `None` ("does not apply to this row") stays.

    Args:
        values: What the reward function returned: a list, tuple, array or tensor with one value per reply.
        name: The reward function's name.
        completions: The replies that were scored.
        row_name: What errors call the rows; by default their indices.

    Raises:
        TypeError: If the output is no sequence or a value is no number.
        ValueError: If there are more or fewer values than replies, or a value is not finite.
    """
    try:
        values = list(values)
    except TypeError as error:
        raise TypeError(
            f"the reward function `{name}` returned {values!r} ({type(values).__name__}) for {len(completions)} "
            "replies. Return a list with one number per reply."
        ) from error
    if len(values) != len(completions):
        raise ValueError(
            f"the reward function `{name}` returned {len(values)} values for {len(completions)} replies. Return "
            "exactly one number per reply, `None` where the function does not apply."
        )
    return [
        finite_reward(value, name, name_row(row, reply, row_name))
        for row, (value, reply) in enumerate(zip(values, completions, strict=True))
    ]


def finite_reward(value: object, name: str, row: str) -> float | None:
    """A value of a reward function as a finite number; `None` stays.

    Args:
        value: What it returned.
        name: Its name.
        row: What errors call the reply.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    if value is None:
        return None
    if not isinstance(value, Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise TypeError(
            f"the reward function `{name}` returned {value!r} for {row}. Return a number, or "
            "`None` where the function does not apply."
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"the reward function `{name}` returned {number} for {row}. A reward must be "
            "finite: fix the function or drop the row, or return `None` where the function does not apply."
        )
    return number


def wrapped(
    reward_func: RewardFunction, after: Callable[[Iterable[object], Sequence, Sequence[str] | None], list]
) -> RewardFunction:
    """The reward function with `after(values, completions, row_name)` applied to its output."""

    async def later(*args: Any, **kwargs: Any) -> list:
        pending = cast(Awaitable[Iterable[object]], reward_func(*args, **kwargs))
        return after(await pending, _completions(args, kwargs), kwargs.get(ROW_NAME))

    def at_once(*args: Any, **kwargs: Any) -> list:
        return after(reward_func(*args, **kwargs), _completions(args, kwargs), kwargs.get(ROW_NAME))

    call = later if is_asynchronous(reward_func) else at_once
    call.__name__ = call.__qualname__ = reward_name(reward_func)
    call.__doc__ = reward_func.__doc__
    call.__wrapped__ = reward_func  # inspect.signature follows it
    return cast(RewardFunction, call)  # TRL awaits what an `async` one returns


def _completions(args: tuple, kwargs: dict[str, Any]) -> Sequence:
    return kwargs["completions"] if "completions" in kwargs else args[1]


def checked(reward_func: _Scorer) -> _Scorer:
    """A reward function that raises for NaN, infinite, missing or surplus values instead of passing them on.

    TRL reads NaN as "does not apply" and continues without it, so a broken scorer would be ignored silently.
    `None` keeps that meaning. The name (TRL's log key), the signature and `async` functions stay as they are.

    Args:
        reward_func: A reward function. What TRL also takes in its place, a model or its name, comes back unchanged:
            TRL computes those scores itself.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(reward_func, (str, torch.nn.Module)):
        return cast(_Scorer, reward_func)
    if not callable(reward_func):
        raise TypeError(
            f"a reward function is a callable, a model or a model's name; got {type(reward_func).__name__}. Pass "
            "functions `(prompts, completions, completion_ids, **columns) -> list[float]`."
        )
    function = cast(RewardFunction, reward_func)
    return cast(_Scorer, wrapped(function, partial(_checked_values, name=reward_name(function))))


def _checked_values(
    values: Iterable[object], completions: Sequence, row_name: Sequence[str] | None, name: str
) -> list[float | None]:
    return finite_rewards(values, name, completions, row_name)

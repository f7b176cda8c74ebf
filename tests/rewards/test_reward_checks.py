import asyncio
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_vlm.rewards import LengthTerm, RewardStatistics, checked, normalized

REPLIES = [[{"role": "assistant", "content": text}] for text in ("a cup", "a dog")]


def returning(values):
    def gives(prompts, completions, completion_ids=None, **columns):
        """Gives what it was told."""
        return values

    return gives


@pytest.mark.parametrize(
    "values",
    [[1.0, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2.0)]],
)
def test_numbers_of_any_kind_pass_as_floats(values):
    rewards = checked(returning(values))(prompts=[[], []], completions=REPLIES)
    assert rewards == [1.0, 2.0] and all(type(reward) is float for reward in rewards)


def test_none_stays_not_applicable():
    assert checked(returning([None, 1.0]))([[], []], REPLIES) == [None, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_value_that_is_not_finite_names_function_row_and_reply(bad):
    with pytest.raises(ValueError, match=r"`gives` returned (nan|inf|-inf) for row 1 \(reply 'a dog'\)"):
        checked(returning([1.0, bad]))(prompts=[[], []], completions=REPLIES)


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3])
def test_a_wrong_number_of_values_names_function_and_both_counts(values):
    with pytest.raises(ValueError, match=rf"`gives` returned {len(values)} values for 2 replies"):
        checked(returning(values))(prompts=[[], []], completions=REPLIES)


def test_values_that_are_no_numbers_are_type_errors():
    with pytest.raises(TypeError, match=r"`gives` returned 1.0 \(float\) for 2 replies"):
        checked(returning(1.0))(prompts=[[], []], completions=REPLIES)
    with pytest.raises(TypeError, match=r"`gives` returned '0.5' for row 0"):
        checked(returning(["0.5", 1.0]))(prompts=[[], []], completions=REPLIES)


def test_plain_text_and_broken_replies_are_named_too():
    with pytest.raises(ValueError, match=r"row 0 \(reply 'just text'\)"):
        checked(returning([math.nan]))(prompts=[""], completions=["just text"])
    with pytest.raises(ValueError, match=r"row 0 \(reply '\[None\]'\)"):
        checked(returning([math.nan]))(prompts=[""], completions=[[None]])


def test_long_replies_are_shortened():
    with pytest.raises(ValueError, match=rf"reply '{'x' * 60}\.\.\.'"):
        checked(returning([math.nan]))(prompts=[""], completions=["x" * 500])


@pytest.mark.parametrize("wrap", [checked, lambda f: normalized(f, RewardStatistics(0.0, 1.0, 2))])
def test_name_signature_and_documentation_stay(wrap):
    reward = returning([1.0, 2.0])
    assert get_callable_name(wrap(reward)) == "gives"
    assert inspect.signature(wrap(reward)) == inspect.signature(reward)
    assert wrap(reward).__doc__ == reward.__doc__
    assert get_callable_name(wrap(LengthTerm())) == get_callable_name(LengthTerm()) == "length"
    assert get_callable_name(wrap(partial(reward, completion_ids=[]))) == "gives"


class Asynchronous:
    async def __call__(self, prompts, completions, **columns):
        return [1.0, columns["last"][0]]


async def asynchronous(prompts, completions, last, **columns):
    return [1.0, last[0]]


@pytest.mark.parametrize("reward", [asynchronous, Asynchronous(), partial(asynchronous, completion_ids=[])])
def test_asynchronous_functions_stay_asynchronous_and_are_checked(reward):
    wrapped = checked(reward)
    assert is_async_callable(wrapped) and get_callable_name(wrapped) == get_callable_name(reward)
    assert asyncio.run(wrapped(prompts=[[], []], completions=REPLIES, last=[2])) == [1.0, 2.0]
    with pytest.raises(ValueError, match="returned nan for row 1"):
        asyncio.run(wrapped(prompts=[[], []], completions=REPLIES, last=[math.nan]))


def test_models_and_their_names_are_left_to_trl():
    model = torch.nn.Linear(1, 1)
    assert checked(model) is model and checked("some/model") == "some/model"
    with pytest.raises(TypeError, match="a reward function is a callable"):
        checked(3)

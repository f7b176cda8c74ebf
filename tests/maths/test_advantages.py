"""GAE, KL estimators, shaped rewards and whitening, against hand values and slow definitions."""

import math

import pytest
import torch
from torch.testing import assert_close

from trl_vlm.maths.advantages import generalized_advantages, moments, per_token_kl, shaped_rewards, whiten


def gae_by_definition(rewards, values, gamma, lam):
    """The double sum of GAE over one reply, one token at a time: slow and obvious."""
    length, v = len(rewards), [*values, 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 4, 1])
    mask = torch.arange(7) < lengths[:, None]
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_gae_matches_its_definition(rollout, gamma, lam):
    rewards, values, mask = rollout
    fast = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        slow = gae_by_definition(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert_close(fast.advantages[row, :length], torch.tensor(slow, dtype=torch.float64), atol=1e-6, rtol=0)
        assert_close(fast.returns[row, :length], fast.advantages[row, :length] + values[row, :length])
        assert not fast.advantages[row, length:].any() and not fast.returns[row, length:].any()


def test_with_gamma_and_lambda_one_the_return_is_the_sum_of_the_rewards_to_come():
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    result = generalized_advantages(rewards, torch.randn(1, 3), torch.ones(1, 3), gamma=1.0, lam=1.0)
    assert_close(result.returns, torch.tensor([[6.0, 5.0, 3.0]]))


def test_padding_changes_nothing(rollout):
    rewards, values, mask = rollout
    plain = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    garbage = torch.full((3, 2), 99.0, dtype=torch.float64)
    padded = generalized_advantages(
        torch.cat([garbage, rewards, garbage], 1),
        torch.cat([garbage, values, garbage], 1),
        torch.nn.functional.pad(mask, (2, 2)),
        gamma=0.9,
        lam=0.5,
    )
    assert_close(padded.advantages[:, 2:-2], plain.advantages)
    assert_close(padded.returns[:, 2:-2], plain.returns)


def test_tokens_of_a_tool_in_the_middle_of_a_reply_are_skipped():
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    mask = torch.tensor([[True, False, False, True, True]])
    kept = mask[0]
    whole = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    compressed = generalized_advantages(rewards[:, kept], values[:, kept], torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert_close(whole.advantages[:, kept], compressed.advantages)


def test_kl_estimators_by_hand():
    logps, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert_close(per_token_kl(logps, reference, "k1"), torch.tensor([[0.5, -1.0]]))
    assert_close(per_token_kl(logps, reference, "clamped_k1"), torch.tensor([[0.5, 0.0]]))
    assert_close(per_token_kl(logps, reference, "k3"), torch.tensor([[math.exp(-0.5) - 0.5, math.e - 2]]))
    with pytest.raises(ValueError, match="must be one of k1, k3, clamped_k1"):
        per_token_kl(logps, reference, "k2")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    torch.manual_seed(0)
    policy, reference = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    expected = (policy.exp() * per_token_kl(policy[None], reference[None], estimator)[0]).sum()
    assert_close(expected, exact)


def test_the_score_lies_on_the_last_real_token():
    scores, kl = torch.tensor([2.0, -1.0, 5.0]), torch.ones(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    rewards = shaped_rewards(scores, kl, mask, kl_coef=0.1)
    by_hand = [[-0.1, -0.1, 1.9, 0.0], [-0.1, -0.1, -0.1, -1.1], [0.0, 0.0, 0.0, 0.0]]
    assert_close(rewards, torch.tensor(by_hand))


def test_whitened_values_have_mean_zero_and_variance_one_over_the_real_tokens(rollout):
    values, _, mask = rollout
    white = whiten(values, mask, moments(values, mask))
    assert_close(white[mask].mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(white[mask].std(correction=0), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not white[~mask].any()


def test_whitening_over_two_processes_is_whitening_over_all_replies(rollout):
    values, _, mask = rollout
    totals = moments(values[:1], mask[:1]) + moments(values[1:], mask[1:])
    parts = torch.cat([whiten(values[:1], mask[:1], totals), whiten(values[1:], mask[1:], totals)])
    assert_close(parts, whiten(values, mask, moments(values, mask)))


def test_whitening_without_a_shift_keeps_the_mean():
    values, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3)
    white = whiten(values, mask, moments(values, mask), shift_mean=False)
    assert_close(white.mean(), torch.tensor(3.0))
    assert_close(white.std(correction=0), torch.tensor(1.0))


def test_equal_values_and_empty_masks_do_not_blow_up():
    values = torch.full((2, 3), 4.0)
    assert_close(whiten(values, torch.ones(2, 3), moments(values, torch.ones(2, 3))), torch.zeros(2, 3))
    empty = torch.zeros(2, 3)
    assert_close(whiten(values, empty, moments(values, empty)), torch.zeros(2, 3))

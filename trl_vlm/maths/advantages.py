"""From a score per reply to an advantage per token: KL-shaped rewards, GAE, returns, whitening.

Every tensor is (B, T): B replies, T reply tokens, and `mask` is true on the real tokens of a reply.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_vlm.maths.masked import masked_sum

KL_ESTIMATORS = ("k1", "k3", "clamped_k1")


class Advantages(NamedTuple):
    """What the policy and the critic fit; (B, T) each, zero outside the reply."""

    advantages: Tensor
    returns: Tensor


def per_token_kl(logps: Tensor, reference_logps: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, in nats; (B, T), (B, T) -> (B, T).

    With d = logps - reference_logps: `k1` is d (unbiased, may be negative), `k3` is exp(-d) - 1 + d (unbiased, never
    negative), `clamped_k1` is max(0, d): tokens that the policy likes less than the reference cost nothing.

    Source: http://joschu.net/blog/kl-approx.html for k1 and k3; the public code of Fact-RLHF (2309.14525) clamps.
    """
    difference = logps - reference_logps
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return torch.exp(-difference) - 1 + difference
    if estimator == "clamped_k1":
        return difference.clamp(min=0)
    raise ValueError(f"`kl_estimator` is {estimator!r}; it must be one of {', '.join(KL_ESTIMATORS)}.")


def shaped_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, token_scores: Tensor | None = None
) -> Tensor:
    """Reward of each token: -kl_coef * kl everywhere, plus the reply's score on its last real token; (B, T).

    Where parts of the score belong to other tokens, they lie there, and what is left of it on the last one.

    Args:
        scores: (B,), one score per reply.
        kl: (B, T), from `per_token_kl`.
        mask: (B, T), true on real tokens. A reply without any real token gets no reward at all.
        kl_coef: Weight of the penalty, >= 0.
        token_scores: (B, T), the parts of the scores that lie on single tokens; on tokens outside `mask` they stay a
            part of the last one. None: the scores have no parts.

    Source: equation 2 of Fact-RLHF (2309.14525).
    Differs: its public code puts the score on the last padded index, which gamma = lambda = 1 hides.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    if token_scores is not None:
        parts = torch.where(mask, token_scores, torch.zeros_like(token_scores))
        rewards, scores = rewards + parts, scores - parts.sum(1)
    return rewards + is_last * scores[:, None]


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalized advantage estimation: A_t = sum_s (gamma * lam)^(s-t) * (r_s + gamma * V_{s+1} - V_s).

    The sum runs over the real tokens of the reply: tokens outside `mask` are skipped, and
    the value after the last real token is 0. Returns are A + V.

    Args:
        rewards: (B, T).
        values: (B, T), the critic's value of the state in which token t is chosen.
        mask: (B, T).
        gamma: Discount, in [0, 1].
        lam: Lambda of GAE, in [0, 1].

    Source: equation 16 of 1506.02438.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    running, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        real = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        advantages[:, t] = torch.where(real, advantage, 0.0)
        running = torch.where(real, advantage, running)
        next_value = torch.where(real, values[:, t], next_value)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the masked-in values, (3,): add them over processes, then `whiten`."""
    values, mask = values.double(), mask.bool()
    return torch.stack([mask.sum().double(), masked_sum(values, mask), masked_sum(values.square(), mask)])


def whiten(values: Tensor, mask: Tensor, totals: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scales to unit variance (and shifts to zero mean) over the real tokens; (B, T) -> (B, T), zero outside the mask.

    Args:
        values: (B, T).
        mask: (B, T).
        totals: (3,), `moments` of everything that shares one scale, usually of all processes.
        shift_mean: Whether to subtract the mean as well.

    Uses the population variance, as Fact-RLHF does. Differs from its public code, which takes padding into the
    statistics. A single token, or tokens that are all equal, have no scale and come back as zeros (or unscaled by
    more than 1e-8 where the mean stays).
    """
    count = totals[0].clamp(min=1)
    mean = totals[1] / count
    variance = (totals[2] / count - mean.square()).clamp(min=0)
    scaled = (values.double() - mean) / (variance.sqrt() + 1e-8)
    if not shift_mean:
        scaled = scaled + mean
    return torch.where(mask.bool(), scaled, 0.0).to(values.dtype)

"""Losses that TRL does not have. Pure functions of tensors, not reduced."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class ValueLoss(NamedTuple):
    """Per-token terms, (B, T) each; reduce with `masked_mean`."""

    loss: Tensor  # half the squared error, the larger of the clipped and the unclipped one
    clipped: Tensor  # 1.0 where the clipped error is the larger one, so that the gradient is zero


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> ValueLoss:
    """0.5 * max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2): the critic may move by c per rollout.

    Args:
        values: (B, T), the critic now.
        old_values: (B, T), the critic when the replies were sampled.
        returns: (B, T), the targets of the values.
        cliprange: C > 0, in units of the return.

    Source: the PPO implementation of OpenAI baselines; used by Fact-RLHF (2309.14525) with c = 0.2.
    """
    clipped_values = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    return ValueLoss(0.5 * torch.maximum(error, clipped_error), (clipped_error > error).float())


def mean_reward_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """|mean(r_chosen + r_rejected)|, a scalar: keeps the rewards of a reward model centered.

    Args:
        chosen: (P,), rewards of the chosen replies.
        rejected: (P,), rewards of the rejected replies.

    Source: the public code of Fact-RLHF (2309.14525), weight 1e-3.
    Differs from TRL's `center_rewards_coefficient`, which takes the mean of the square.
    """
    return (chosen + rejected).mean().abs()


def anchor_loss(log_ratios: Tensor, *, beta: float, value: float) -> Tensor:
    """-log sigmoid(beta * D - value): keeps a reply at least as likely as the reference finds it, plus `value`.

    Args:
        log_ratios: (P,), D = log pi(y) - log pi_ref(y) of the chosen replies.
        beta: That of DPO.
        value: Delta, in units of beta * D.

    Returns:
        (P,), not reduced.

    Source: mDPO, arXiv:2406.11839, the anchored term.
    """
    return -logsigmoid(beta * log_ratios - value)


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, replies: int) -> float:
    """The KL coefficient after `replies` more replies whose mean KL was `kl` nats per reply.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * replies / horizon): it grows while the policy is further from the
    reference than `target`, and shrinks while it is nearer.

    Source: section 2.2 of 1909.08593.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * replies / horizon)

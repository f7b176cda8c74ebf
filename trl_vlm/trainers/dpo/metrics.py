"""Metrics beyond TRL's: where the margin comes from, and how far the policy has drifted."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from trl_vlm.maths.masked import masked_sum

Gather = Callable[[Tensor], Tensor]


def dense_metrics(ratios: Tensor, is_changed: Tensor, is_reply: Tensor, gather: Gather) -> dict[str, float]:
    """Fraction of changed tokens, margins on changed and unchanged tokens, number of pairs without changes.

    Args:
        ratios: (K * P, T), log pi - log pi_ref per token.
        is_changed: (K - 1, 2 * P, T), bool.
        is_reply: (K * P, T), bool.
        gather: Over processes.

    Returns:
        The margins are sums over tokens, chosen minus rejected, in nats, means over pairs.
    """
    rows = is_changed.size(1) // 2
    changed_margins, other_margins, shares, unchanged_pairs = [], [], [], []
    for pair, changed in enumerate(is_changed):
        place = [*range(rows), *range((pair + 1) * rows, (pair + 2) * rows)]
        ratio, reply = ratios[place], is_reply[place]
        for margins, mask in ((changed_margins, changed & reply), (other_margins, ~changed & reply)):
            chosen, rejected = masked_sum(ratio, mask, dim=1).chunk(2)
            margins.append(chosen - rejected)
        counts = torch.stack([(changed & reply).sum(1), reply.sum(1)]).float()
        shares.append(counts)
        chosen, rejected = counts[0].chunk(2)
        unchanged_pairs.append((chosen + rejected == 0).float())
    tokens = gather(torch.cat(shares, dim=1).sum(1)[None]).sum(0)
    return {
        "dense/changed_share": (tokens[0] / tokens[1].clamp(min=1)).item(),
        "dense/margin_changed": gather(torch.cat(changed_margins)).mean().item(),
        "dense/margin_unchanged": gather(torch.cat(other_margins)).mean().item(),
        "dense/pairs_without_change": int(gather(torch.cat(unchanged_pairs)).sum().item()),
    }


def drift_metrics(ratios: Tensor, is_reply: Tensor, num_replies: int, gather: Gather) -> dict[str, float]:
    """Mean log pi - log pi_ref per token, in nats, of the chosen and of the rejected replies.

    Args:
        ratios: (K * P, T).
        is_reply: (K * P, T), bool.
        num_replies: K.
        gather: Over processes.
    """
    rows = len(ratios) // num_replies
    drift = {}
    for name, place in (("chosen", slice(0, rows)), ("rejected", slice(rows, None))):
        total = torch.stack([masked_sum(ratios[place], is_reply[place]), is_reply[place].sum().float()])
        total = gather(total[None]).sum(0)
        drift[f"drift/{name}"] = (total[0] / total[1].clamp(min=1)).item()
    return drift


def image_metrics(
    log_ratios: Tensor, log_probs: tuple[Tensor, Tensor], tokens: Tensor, beta: float
) -> dict[str, Tensor]:
    """How much likelier chosen replies are under their own images than under corrupted ones, (P,) each.

    Args:
        log_ratios: (2P,), log pi - log pi_ref of the chosen replies, under their own images first; without a
            reference log pi.
        log_probs: (P,) and (P,), log pi of the policy.
        tokens: (P,), of the replies.
        beta: That of the loss.

    Returns:
        The accuracy counts a tie as half: a policy that ignores the image is at chance.
    """
    margins = operator.sub(*log_ratios.chunk(2))
    return {
        "image/margin": beta * margins,
        "image/accuracy": 0.5 * (1 + margins.sign()),
        "image/gain": operator.sub(*log_probs) / tokens,
        "image/logps_corrupted": log_probs[1],
    }


def token_metrics(
    policy: Tensor,
    reference: Tensor,
    is_reply: Tensor,
    is_changed: Tensor | None,
    num_replies: int | None,
    gather: Gather,
) -> dict[str, float]:
    """`dense_metrics` with changed tokens, and `drift_metrics` with a number of replies.

    Args:
        policy: (K * P, any), log-probabilities per token, of which the last T are read.
        reference: The same of the reference.
        is_reply: (K * P, T), bool.
        is_changed: (K - 1, 2 * P, T), bool, or None.
        num_replies: K, or None.
        gather: Over processes.
    """
    width = is_reply.size(1)
    ratios = policy[:, -width:] - reference.to(policy.device)[:, -width:]
    measured: dict[str, float] = {}
    if is_changed is not None:
        measured |= dense_metrics(ratios, is_changed, is_reply, gather)
    if num_replies is not None:
        measured |= drift_metrics(ratios, is_reply, num_replies, gather)
    return measured

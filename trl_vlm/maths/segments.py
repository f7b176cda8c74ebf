"""The weight of each token in the score of Dense DPO; `trl_vlm.maths.changed_tokens` finds which tokens differ.

Source: RLHF-V, arXiv:2312.00849, section 3.1, and the code that trained it (thunlp/Muffin, `utils/diff_lib.py`).
"""

import torch
from torch import Tensor

from trl_vlm.maths.masked import weighted_mean


def segment_weights(
    is_changed: Tensor,
    is_reply: Tensor,
    *,
    gamma: float,
    reduction: str,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The weight of each token, such that the weighted sum of log-probabilities is the score of Dense DPO.

        mean:  w_i = g_i / (sum of g over the reply)        sum:  w_i = g_i        g_i = gamma if changed, else 1

    Args:
        is_changed: (..., T), bool.
        is_reply: (..., T), bool; a position outside the reply weighs 0.
        gamma: Weight of a changed token, at least 1.
        reduction: "mean" (the paper) or "sum" (the released code).
        token_weights: (..., T), values of g_i in place of 1 and gamma, not negative; nan where there is none.

    Returns:
        (..., T), float32, not negative.

    Source: RLHF-V, arXiv:2312.00849, equation 5: N = |unchanged| + gamma * |changed|.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' (the paper) or 'sum' (the released code).")
    weights = 1.0 + (gamma - 1.0) * is_changed.float()
    if token_weights is not None:
        weights = torch.where(token_weights.isnan(), weights, token_weights.to(weights.dtype))
    weights = weights * is_reply
    if reduction == "sum":
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def dense_score(
    logps: Tensor,
    is_changed: Tensor,
    is_reply: Tensor,
    *,
    gamma: float,
    reduction: str,
    token_weights: Tensor | None = None,
    score_weights: Tensor | None = None,
) -> Tensor:
    """The score of a reply in Dense DPO, in nats: its weighted mean or sum of log-probabilities.

    Four unchanged tokens at -1 and two changed ones at -2 give -24/14 = -1.7143 as a mean with gamma 5, and -8.4 as a
    sum with gamma 1.1.

    Args:
        logps: (..., T), log-probabilities.
        is_changed: (..., T), bool.
        is_reply: (..., T), bool.
        gamma: Weight of a changed token, at least 1.
        reduction: "mean" or "sum".
        token_weights: (..., T), weights in place of 1 and gamma, not negative; nan where there is none.
        score_weights: (...), the score is multiplied by it.

    Returns:
        (...).

    Source: HSA-DPO, arXiv:2404.14233, for `score_weights`: the severity of what is wrong in a rejected reply.
    """
    weights = segment_weights(is_changed, is_reply, gamma=gamma, reduction=reduction, token_weights=token_weights)
    if reduction == "mean":
        score = weighted_mean(logps, weights)
    else:
        score = torch.where(weights > 0, logps * weights, torch.zeros_like(logps)).sum(-1)
    return score if score_weights is None else score * score_weights

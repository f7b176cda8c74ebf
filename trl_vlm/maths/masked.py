"""Weighted and masked reductions. A mask is True (or 1) where a position counts; an empty mask reduces to 0."""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of `values` where `mask` is true; a masked-out position adds 0 even if it holds inf or nan.

    Args:
        values: (..., T), any real values.
        mask: Broadcastable to `values`, bool or 0/1.
        dim: Dimensions to reduce; all of them by default.
    """
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where nothing is.

    Args:
        values: (..., T), any real values.
        mask: The same shape, bool or 0/1.
        dim: Dimensions to reduce; all of them by default.
    """
    return masked_sum(values, mask, dim) / mask.sum(dim).clamp(min=1)


def weighted_mean(values: Tensor, weights: Tensor, dim: int = -1) -> Tensor:
    """Weighted mean along `dim`: sum of w * v over sum of w; 0 where no position has any weight.

    A position of weight 0 adds 0 even if its value is inf or nan.

    Args:
        values: (..., T), any real values.
        weights: The same shape, not negative.
        dim: The dimension to reduce.
    """
    terms = torch.where(weights > 0, values * weights, torch.zeros_like(values))
    return terms.sum(dim) / weights.sum(dim).clamp(min=torch.finfo(values.dtype).tiny)

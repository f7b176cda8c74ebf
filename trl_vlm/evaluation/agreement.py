"""Do two lists of scores put things in the same order? Kendall's tau-b and Spearman's rho, with ties."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trl_vlm.evaluation.statistics import RESAMPLES, Interval, drawn_counts, ends

_CHUNK = 250  # resamples at once
MOST_POINTS = 1500  # different pairs of scores; beyond it memory and time grow too large for an interval


class Agreement(NamedTuple):
    """How far two lists of scores agree about an order: 1 wholly, 0 not at all, -1 the other way round.

    Attributes:
        kendall: Kendall's tau-b: pairs in the same order minus pairs in the other one, over those without ties.
        spearman: Spearman's rho: the correlation of the ranks, equal scores sharing their mean rank.
        count: How many things were compared.
    """

    kendall: Interval
    spearman: Interval
    count: int


def rank_agreement(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str], *, seed: int = 0
) -> Agreement:
    """How far two lists of scores agree, with 95 % intervals of a bootstrap over groups.

    Args:
        first: One score per thing.
        second: Another score of each.
        groups: What is resampled as one: the image of each reply; for models each its own.
        seed: Of the resampling.

    Raises:
        ValueError: The lists have different lengths.
    """
    if not len(first) == len(second) == len(groups):
        raise ValueError(f"there are {len(first)} and {len(second)} scores in {len(groups)} groups; needed: as many.")
    points, place = np.unique(np.column_stack([first, second]).reshape(-1, 2), axis=0, return_inverse=True)
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    # How often each group has each pair of scores.
    table = np.zeros((len(names), len(points)))
    np.add.at(table, (member, place.reshape(-1)), 1.0)
    values = _values(points, table.sum(0, keepdims=True))
    drawn = [np.full(1, np.nan)] * 2
    if 0 < len(points) <= MOST_POINTS:
        rng, chunks = np.random.default_rng(seed), []
        for start in range(0, RESAMPLES, _CHUNK):
            counts = drawn_counts(rng, min(_CHUNK, RESAMPLES - start), len(names))
            chunks.append(_values(points, counts @ table))
        drawn = [np.concatenate(each) for each in zip(*chunks, strict=True)]
    kendall, spearman = (Interval(float(v[0]), *ends(d)) for v, d in zip(values, drawn, strict=True))
    return Agreement(kendall, spearman, len(first))


def _values(points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tau-b and rho of each row of weights (draws, points), which say how often each point is there."""
    if not len(points):
        return np.full(1, np.nan), np.full(1, np.nan)
    signs = [np.sign(scores[:, None] - scores[None, :]) for scores in points.T]
    concordant, untied_first, untied_second = (
        ((weights @ matrix) * weights).sum(1) for matrix in (signs[0] * signs[1], *map(np.abs, signs))
    )
    # Ranks: as many as are lower, and half of those that are equal.
    ranks = [weights @ (sign.T < 0) + weights @ (sign == 0) / 2 for sign in signs]
    means = [(weights * rank).sum(1, keepdims=True) / weights.sum(1, keepdims=True) for rank in ranks]
    apart = [rank - mean for rank, mean in zip(ranks, means, strict=True)]
    products = ((weights * one * two).sum(1) for one, two in ((apart[0], apart[1]), (apart[0],) * 2, (apart[1],) * 2))
    together, spread_first, spread_second = products
    return _over(concordant, untied_first * untied_second), _over(together, spread_first * spread_second)


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient by a root; NaN where all scores of a list are equal, so that there is no order."""
    below = np.where(below > 1e-12, below, np.nan)
    return above / np.sqrt(below)

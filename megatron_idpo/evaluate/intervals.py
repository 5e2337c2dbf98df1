"""How far a figure that was measured on held-out pairs may be from the truth.

Pairs of one prompt resemble each other, so it is prompts that are drawn again, each with all its
pairs: an interval over single pairs would be too narrow.

Shapes: P pairs, G prompts, K quantities, S resamples; 2 = low, high.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DRAWS_AT_ONCE = 10_000_000
"""Prompts drawn in one piece: 80 MB of counts."""

_UNDEFINED = 0.05
"""A statistic that is undefined in this share of the resamples has no interval."""


def bootstrap_interval(
    values_PK: Floats,
    prompt_P: NDArray[np.int64],
    *,
    samples: int,
    seed: int,
    statistic: Callable[[Floats], Floats] | None = None,
) -> Floats:
    """95 % percentile intervals of statistics of means, over resampled prompts.

    Args:
        values_PK: what is averaged over pairs, [P, K].
        prompt_P: which prompt each pair is of, any integers.
        samples: resamples S.
        seed: of the drawing; the same for the same data, so that models are compared on the same
            resamples.
        statistic: from means [S, K] to statistics [S, J]; None: the means themselves.

    Returns:
        [2, J]; NaN where there is one prompt only, or a statistic is undefined.
    """
    _, group_P = np.unique(prompt_P, return_inverse=True)
    groups = int(group_P.max()) + 1
    columns = np.column_stack([np.ones(len(values_PK)), values_PK])
    sums_GK = np.zeros((groups, columns.shape[1]))
    np.add.at(sums_GK, group_P, columns)
    random = np.random.default_rng(seed)
    found, left = [], samples
    while left:
        part = max(1, min(left, _DRAWS_AT_ONCE // groups))
        counts_SG = random.multinomial(groups, np.full(groups, 1 / groups), size=part)
        drawn_SK = counts_SG.astype(np.float64) @ sums_GK
        means_SK = drawn_SK[:, 1:] / drawn_SK[:, :1]
        found.append(means_SK if statistic is None else statistic(means_SK))
        left -= part
    drawn_SJ = np.concatenate(found)
    bounds = np.full((2, drawn_SJ.shape[1]), np.nan)
    if groups > 1:
        # A statistic may be undefined for a resample of one prompt alone; of few, say nothing.
        is_known_J = np.isnan(drawn_SJ).mean(axis=0) < _UNDEFINED
        bounds[:, is_known_J] = np.nanpercentile(drawn_SJ[:, is_known_J], [2.5, 97.5], axis=0)
    return bounds


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of so uneven a split, were both sides as likely.

    Exact. Ties are left out of the counts; without any decision the value is 1.
    """
    assert wins >= 0 and losses >= 0, (wins, losses)
    decided = wins + losses
    term = tail = 1  # of the binomial row, from the end
    for count in range(min(wins, losses)):
        term = term * (decided - count) // (count + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**decided))

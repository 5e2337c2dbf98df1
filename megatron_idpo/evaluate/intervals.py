"""How far a figure that was measured on held-out pairs may be from the truth.

Pairs of one prompt resemble each other, so it is prompts that are drawn again, each with all its
pairs: an interval over single pairs would be too narrow.

Shapes: P pairs, G prompts, K quantities, S resamples; 2 = low, high.
"""

from collections.abc import Callable
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DRAWS_AT_ONCE = 10_000_000
"""Prompts drawn in one piece: 80 MB of counts."""


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
        [2, J]. Where there is one prompt only, nothing is known: NaN.
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
    if groups == 1:
        return np.full((2, drawn_SJ.shape[1]), np.nan)
    bounds: Floats = np.percentile(drawn_SJ, [2.5, 97.5], axis=0)
    return bounds


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of so uneven a split, were both sides as likely.

    Exact. Ties are left out of the counts; without any decision the value is 1.
    """
    assert wins >= 0 and losses >= 0, (wins, losses)
    decided = wins + losses
    tail = sum(comb(decided, count) for count in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**decided))

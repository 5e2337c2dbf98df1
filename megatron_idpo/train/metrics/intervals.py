"""Confidence intervals and tests of figures that are measured on a sample of pairs.

Pairs of one prompt are correlated. `bootstrap_interval` therefore resamples prompts, each with all
its pairs: an interval over single pairs would be too narrow.

Shapes: P pairs, G prompts, K quantities, S resamples; 2 = low, high.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_Z_95 = 1.959964
"""97.5 % quantile of the normal distribution."""

_DRAWS_AT_ONCE = 10_000_000
"""Prompts drawn in one chunk: 80 MB of counts."""

_MAX_UNDEFINED = 0.05
"""A statistic that is NaN in this share of the resamples has no interval."""


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % Wilson score interval of a binomial share.

    Args:
        share: of the sample, 0 to 1.
        count: sample size, above 0.

    Returns:
        Lower and upper bound, within 0 to 1 and with the share between them; NaN for a NaN share.
    """
    assert count > 0, count
    z = _Z_95
    shrink = 1 + z**2 / count
    center = (share + z**2 / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = max(center - half, 0.0), min(center + half, 1.0)
    # Rounding may put a bound beyond a share of 0 or 1. In this order of arguments NaN stays NaN.
    return min(low, share), max(high, share)


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
        prompt_P: the prompt of each pair, any integers.
        samples: resamples S.
        seed: of the resampling. The same seed on the same prompts draws the same resamples, so that
            models are compared on equal ones.
        statistic: from means [S, K] to statistics [S, J]; None: the means themselves.

    Returns:
        [2, J]; NaN for a single prompt, or where a statistic is undefined.
    """
    _, group_P = np.unique(prompt_P, return_inverse=True)
    groups = int(group_P.max()) + 1
    columns = np.column_stack([np.ones(len(values_PK)), values_PK])
    sums_GK = np.zeros((groups, columns.shape[1]))
    np.add.at(sums_GK, group_P, columns)
    random = np.random.default_rng(seed)
    chunks, remaining = [], samples
    while remaining:
        size = max(1, min(remaining, _DRAWS_AT_ONCE // groups))
        counts_SG = random.multinomial(groups, np.full(groups, 1 / groups), size=size)
        drawn_SK = counts_SG.astype(np.float64) @ sums_GK
        means_SK = drawn_SK[:, 1:] / drawn_SK[:, :1]
        chunks.append(means_SK if statistic is None else statistic(means_SK))
        remaining -= size
    drawn_SJ = np.concatenate(chunks)
    bounds = np.full((2, drawn_SJ.shape[1]), np.nan)
    if groups > 1:
        # A ratio may be undefined in a resample that drew one prompt only; rare ones are ignored.
        is_defined_J = np.isnan(drawn_SJ).mean(axis=0) < _MAX_UNDEFINED
        bounds[:, is_defined_J] = np.nanpercentile(drawn_SJ[:, is_defined_J], [2.5, 97.5], axis=0)
    return bounds


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the sign test.

    Ties are not counted; without any decision the value is 1.
    """
    assert wins >= 0 and losses >= 0, (wins, losses)
    decided = wins + losses
    term = tail = 1  # binomial coefficients, summed from the tail
    for count in range(min(wins, losses)):
        term = term * (decided - count) // (count + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**decided))

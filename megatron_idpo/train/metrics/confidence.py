"""How far a share that was counted in a sample may be from the truth."""

import math

Z_95 = 1.959964
"""The normal distribution's 97.5 % quantile."""


def wilson_interval(share: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share.

    Args:
        share: of the sample, 0 to 1.
        count: size of the sample, above 0.
        z: standard deviations; the default gives 95 %.

    Returns:
        Lower and upper bound, within 0 to 1, with the share between them; NaN for a share that is
        NaN.
    """
    assert count > 0, count
    shrink = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    # Rounding may put a bound beyond a share of 0 or 1. In this order NaN stays NaN.
    return min(low, share), max(high, share)

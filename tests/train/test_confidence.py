"""Wilson's interval, against published values."""

import math

import pytest

from megatron_idpo.train.metrics.confidence import wilson_interval


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # The paper's two results, as DESIGN quotes them: 37-67 % and 52-80 %.
        (21, 40, 0.37, 0.67),
        (27, 40, 0.52, 0.80),
        # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(wins, count, low, high):
    digits = 0.005 if count == 40 else 0.00005
    assert wilson_interval(wins / count, count) == pytest.approx((low, high), abs=digits)


def test_ends_and_nothing_known():
    assert wilson_interval(1.0, 3)[1] == pytest.approx(1.0)
    assert wilson_interval(0.0, 3)[0] == pytest.approx(0.0, abs=1e-15)
    low, high = wilson_interval(math.nan, 3)
    assert math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5, 1 / 3])
def test_the_share_is_between_its_bounds(share):
    for count in range(1, 2001):
        low, high = wilson_interval(share, count)
        assert 0.0 <= low <= share <= high <= 1.0, count

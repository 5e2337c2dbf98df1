"""Confidence intervals and the sign test, compared with published values."""

import math

import numpy as np
import pytest

from megatron_idpo.train.metrics.intervals import bootstrap_interval, sign_test, wilson_interval


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # The two results of the intermediate-DPO paper: 37-67 % and 52-80 %.
        (21, 40, 0.37, 0.67),
        (27, 40, 0.52, 0.80),
        # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(wins, count, low, high):
    digits = 0.005 if count == 40 else 0.00005
    assert wilson_interval(wins / count, count) == pytest.approx((low, high), abs=digits)


def test_wilson_interval_of_0_1_and_nan():
    assert wilson_interval(1.0, 3)[1] == pytest.approx(1.0)
    assert wilson_interval(0.0, 3)[0] == pytest.approx(0.0, abs=1e-15)
    low, high = wilson_interval(math.nan, 3)
    assert math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5, 1 / 3])
def test_share_is_within_its_interval(share):
    for count in range(1, 2001):
        low, high = wilson_interval(share, count)
        assert 0.0 <= low <= share <= high <= 1.0, count


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (21, 19, 0.8746),  # the intermediate-DPO paper against DPO
        (27, 13, 0.0385),  # and against SFT
        (5, 0, 0.0625),
        (600, 400, 2.72e-10),
    ],
)
def test_sign_test(wins: int, losses: int, expected: float) -> None:
    """Against R's binom.test and by hand (2 / 2^5)."""
    assert sign_test(wins, losses) == pytest.approx(expected, rel=2e-3)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_bootstrap_intervals_cover_the_true_mean() -> None:
    """Of 300 samples of 40 pairs, about 95 % have the true mean in their interval."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values_P1 = random.normal(0.3, 1.0, (40, 1))
        (low,), (high,) = bootstrap_interval(values_P1, np.arange(40), samples=400, seed=trial)
        covered += bool(low <= 0.3 <= high)
    assert 270 <= covered <= 295, covered  # percentile intervals are slightly narrow


def test_pairs_of_a_prompt_are_resampled_together() -> None:
    """Four copies of every pair do not narrow the interval."""
    random = np.random.default_rng(1)
    values_P1 = random.normal(size=(50, 1))
    once = bootstrap_interval(values_P1, np.arange(50), samples=500, seed=3)
    copies = bootstrap_interval(
        np.repeat(values_P1, 4, axis=0), np.repeat(np.arange(50), 4) + 7, samples=500, seed=3
    )
    np.testing.assert_allclose(copies, once, atol=1e-12)
    separate = bootstrap_interval(
        np.repeat(values_P1, 4, axis=0), np.arange(200), samples=500, seed=3
    )
    assert np.ptp(separate) < 0.7 * np.ptp(once)


def test_whole_prompts_are_resampled() -> None:
    values_P1 = np.array([[1.0]] * 9 + [[0.0]])
    low, high = bootstrap_interval(values_P1, np.array([0] * 9 + [1]), samples=999, seed=0)
    assert (low[0], high[0]) == (0.0, 1.0)  # a resample may have one prompt only
    mean = bootstrap_interval(
        values_P1, np.array([0] * 9 + [1]), samples=2000, seed=0, statistic=lambda m_SK: m_SK
    )
    assert mean.shape == (2, 1)


def test_single_prompt_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval(np.ones((5, 2)), np.zeros(5, int), samples=9, seed=0)).all()


def test_equal_seeds_give_equal_intervals() -> None:
    values_PK = np.random.default_rng(2).normal(size=(30, 3))
    one, again, other = (
        bootstrap_interval(values_PK, np.arange(30), samples=200, seed=seed) for seed in (5, 5, 6)
    )
    assert (one == again).all() and (one != other).any()

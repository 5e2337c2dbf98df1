"""Intervals and the sign test: known values, coverage, and that a prompt's pairs are one draw."""

import numpy as np
import pytest
from megatron_idpo.evaluate.intervals import bootstrap_interval, sign_test


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (21, 19, 0.8746),  # the intermediate-DPO paper's against DPO: nothing is shown
        (27, 13, 0.0385),  # and against SFT
        (5, 0, 0.0625),
        (600, 400, 2.72e-10),
    ],
)
def test_sign_test(wins: int, losses: int, expected: float) -> None:
    """Against R's binom.test and by hand (2 / 2^5)."""
    assert sign_test(wins, losses) == pytest.approx(expected, rel=2e-3)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_intervals_cover_the_truth() -> None:
    """Of 300 samples of 40 pairs, about 95 % have the true mean in their interval."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values_P1 = random.normal(0.3, 1.0, (40, 1))
        (low,), (high,) = bootstrap_interval(values_P1, np.arange(40), samples=400, seed=trial)
        covered += bool(low <= 0.3 <= high)
    assert 270 <= covered <= 295, covered  # percentile intervals are a little narrow


def test_pairs_of_a_prompt_are_drawn_together() -> None:
    """Four copies of every pair say no more than the pairs themselves."""
    random = np.random.default_rng(1)
    values_P1 = random.normal(size=(50, 1))
    once = bootstrap_interval(values_P1, np.arange(50), samples=500, seed=3)
    copies = bootstrap_interval(
        np.repeat(values_P1, 4, axis=0), np.repeat(np.arange(50), 4) + 7, samples=500, seed=3
    )
    np.testing.assert_allclose(copies, once, atol=1e-12)
    apart = bootstrap_interval(np.repeat(values_P1, 4, axis=0), np.arange(200), samples=500, seed=3)
    assert np.ptp(apart) < 0.7 * np.ptp(once)


def test_prompts_with_more_pairs_weigh_more() -> None:
    values_P1 = np.array([[1.0]] * 9 + [[0.0]])
    low, high = bootstrap_interval(values_P1, np.array([0] * 9 + [1]), samples=999, seed=0)
    assert (low[0], high[0]) == (0.0, 1.0)  # whole prompts: either may be all there is
    mean = bootstrap_interval(
        values_P1, np.array([0] * 9 + [1]), samples=2000, seed=0, statistic=lambda m_SK: m_SK
    )
    assert mean.shape == (2, 1)


def test_one_prompt_tells_nothing() -> None:
    assert np.isnan(bootstrap_interval(np.ones((5, 2)), np.zeros(5, int), samples=9, seed=0)).all()


def test_the_same_seed_is_the_same_interval() -> None:
    values_PK = np.random.default_rng(2).normal(size=(30, 3))
    one, again, other = (
        bootstrap_interval(values_PK, np.arange(30), samples=200, seed=seed) for seed in (5, 5, 6)
    )
    assert (one == again).all() and (one != other).any()

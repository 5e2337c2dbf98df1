"""Series: running means, thinning, extents."""

import numpy as np
import pytest

from megatron_idpo.figures.series import MAX_POINTS, Series


def series(values: list[float]) -> Series:
    return Series(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def test_short_series_are_not_smoothed() -> None:
    values = [3.0, 1.0, 2.0]
    assert series(values).window == 1
    assert series(values).smoothed().y_S.tolist() == values
    assert len(series([]).smoothed()) == 0


@pytest.mark.parametrize(("count", "window"), [(19, 1), (60, 3), (200, 11), (30_000, 1501)])
def test_window_grows_with_the_series(count: int, window: int) -> None:
    assert series([0.0] * count).window == window


def test_smoothed_is_the_mean_of_the_window() -> None:
    values = np.random.default_rng(0).normal(size=300)
    noisy = series(values.tolist())
    smooth = noisy.smoothed().y_S
    half = noisy.window // 2
    assert smooth[150] == pytest.approx(values[150 - half : 151 + half].mean())
    assert smooth[0] == pytest.approx(values[: noisy.window // 4 + 1].mean())
    assert smooth[-1] == pytest.approx(values[-(noisy.window // 4) - 1 :].mean())


def test_smoothing_keeps_a_straight_line_except_at_its_ends() -> None:
    smooth = series([float(step) for step in range(400)]).smoothed().y_S
    assert smooth[10:-10] == pytest.approx(np.arange(10, 390))


def test_thinned_keeps_both_ends() -> None:
    thin = series([float(step) for step in range(30_000)]).thinned()
    assert len(thin) == MAX_POINTS
    assert (thin.x_S[0], thin.x_S[-1]) == (0.0, 29_999.0)
    assert (np.diff(thin.x_S) > 0).all()
    assert series([1.0, 2.0]).thinned().y_S.tolist() == [1.0, 2.0]


def test_extent_keeps_a_single_spike() -> None:
    values = [1.0] * 30_000
    values[12_345] = 50.0
    low, high = series(values).extent()
    assert len(low) == len(high) == MAX_POINTS
    assert high.y_S.max() == 50.0 and (high.y_S == 50.0).sum() == 1
    assert abs(high.x_S[high.y_S.argmax()] - 12_345) < 30_000 / MAX_POINTS
    assert low.y_S.min() == low.y_S.max() == 1.0
    assert len(series([1.0, 2.0]).extent()[0]) == 2

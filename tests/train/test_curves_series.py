"""Series of the curves: what is known, smoothed without bending, and few enough to be drawn."""

import math

import numpy as np
import pytest

from megatron_idpo.figures.series import MAX_DRAWN, HeldOutAccuracy, Series
from megatron_idpo.train.metrics.confidence import wilson_interval


def of(values: list[float]) -> Series:
    return Series.of([{"step": float(s), "x": value} for s, value in enumerate(values)], "x")


def test_what_is_not_known_is_not_there():
    records = [{"step": 1.0, "x": 5.0}, {"step": 2.0}, {"step": 3.0, "x": math.nan}]
    series = Series.of([*records, {"step": 4.0, "x": 6.0}], "x")
    assert (series.steps_S.tolist(), series.values_S.tolist()) == ([1.0, 4.0], [5.0, 6.0])
    assert len(Series.of(records, "y")) == len(Series.of([], "y")) == 0


@pytest.mark.parametrize("prefix", ["", "layer_3/", "eval_"])
def test_ties_are_no_accuracy(prefix):
    names = (f"{prefix}rewards/accuracies", f"{prefix}rewards/margins")
    values = [(0.0, 0.0), (0.0, -1.0), (0.5, 1e-3), (0.1, -3e-8)]
    records = [
        {"step": 1.0 + n, **dict(zip(names, message, strict=True))}
        for n, message in enumerate(values)
    ]
    assert Series.of(records, names[0]).steps_S.tolist() == [2.0, 3.0]
    assert Series.of(records, names[1]).steps_S.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_short_series_are_drawn_as_they_are():
    values = [3.0, 1.0, 2.0]
    assert of(values).window == 1
    assert of(values).smoothed().values_S.tolist() == values
    assert len(of([]).smoothed()) == 0


@pytest.mark.parametrize(("count", "window"), [(19, 1), (60, 3), (200, 11), (30_000, 1501)])
def test_the_window_grows_with_the_series(count, window):
    assert of([0.0] * count).window == window


def test_a_running_mean_is_the_mean_of_its_window():
    values = np.random.default_rng(0).normal(size=300)
    series = of(values.tolist())
    smooth = series.smoothed().values_S
    half = series.window // 2
    assert smooth[150] == pytest.approx(values[150 - half : 151 + half].mean())
    assert smooth[0] == pytest.approx(values[: series.window // 4 + 1].mean())
    assert smooth[-1] == pytest.approx(values[-(series.window // 4) - 1 :].mean())


def test_a_line_stays_a_line_but_at_its_ends():
    smooth = of([float(step) for step in range(400)]).smoothed().values_S
    assert smooth[10:-10] == pytest.approx(np.arange(10, 390))


def test_long_series_are_thinned_between_their_ends():
    long = of([float(step) for step in range(30_000)])
    thin = long.thinned()
    assert len(thin) == MAX_DRAWN
    assert (thin.steps_S[0], thin.steps_S[-1]) == (0.0, 29_999.0)
    assert (np.diff(thin.steps_S) > 0).all()
    assert of([1.0, 2.0]).thinned().values_S.tolist() == [1.0, 2.0]


def test_the_extent_hides_no_spike():
    values = [1.0] * 30_000
    values[12_345] = 50.0
    steps, low, high = of(values).extent()
    assert len(steps) == MAX_DRAWN
    assert high.max() == 50.0 and (high == 50.0).sum() == 1
    assert abs(steps[high.argmax()] - 12_345) < 30_000 / MAX_DRAWN
    assert low.min() == low.max() == 1.0
    assert all(len(array) == 0 for array in of([]).extent())


def test_held_out_accuracy_has_its_interval_where_it_means_something():
    def record(step: float, accuracy: float, margin: float, pairs: float | None) -> dict:
        message = {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
        return {"step": step, **message, **({} if pairs is None else {"eval_pairs": pairs})}

    records = [record(0, 0, 0, 40), {"step": 5.0}, record(10, 0.7, 1, 40), record(20, 0.8, 1, None)]
    found = HeldOutAccuracy.of(records)
    assert found.shares.steps_S.tolist() == [10.0, 20.0]
    low, high = wilson_interval(0.7, 40)
    assert (found.low_S.tolist(), found.high_S.tolist()) == ([low, 0.8], [high, 0.8])
    assert found.pairs == 40
    assert len(HeldOutAccuracy.of([]).shares) == HeldOutAccuracy.of([]).pairs == 0

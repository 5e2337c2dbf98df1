"""Training charts: the lines of runs of any length, with few or many layers."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.figures.series import MAX_POINTS
from megatron_idpo.figures.style import FINAL
from megatron_idpo.figures.training import GRAD_NORM, LOSS, training_charts
from megatron_idpo.train.metrics.curves import draw_curves, series_of, training_line
from megatron_idpo.train.metrics.intervals import wilson_interval


def write_metrics(
    path: Path, steps: int, layers: Sequence[int], evaluations: Sequence[int]
) -> Path:
    """A run whose final layer learns fastest; before training all held-out pairs are tied."""
    random = np.random.default_rng(0)

    def quality(prefix: str, done: float, noise: float) -> dict[str, float]:
        values = {}
        for layer in (*layers, None):
            name = prefix if layer is None else f"{prefix}layer_{layer}/"
            margin = done * (1 if layer is None else layer / 40) * (1 + noise * random.normal())
            loss = "final_loss" if layer is None else "loss"
            values |= {
                f"{name}{loss}": float(np.log1p(np.exp(-margin))),
                f"{name}rewards/margins": margin,
                f"{name}rewards/accuracies": min(1.0, 0.5 * (done > 0) + 0.4 * done),
            }
        return values | {f"{prefix}loss": values[f"{prefix}final_loss"]}

    with path.open("w") as file:
        for step in range(steps + 1):
            values: dict[str, float] = {}
            if step:
                values = quality("", step / steps, 0.3)
                values |= {"grad_norm": 1 + random.random(), "learning_rate": 1e-4 * step / steps}
            if step in evaluations:
                values |= quality("eval_", step / steps, 0.0) | {"eval_pairs": 40}
            file.write(json.dumps({"step": step, **values}) + "\n")
    return path


def write_lines(path: Path, lines: Sequence[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_panels_have_a_line_per_layer_and_kind(tmp_path: Path, saved_figures: list[Figure]) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", 3, [15, 22], [0, 3])
    target = tmp_path / "new" / "curves.png"
    draw_curves(metrics, target, title="runs/night")
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (figure,) = saved_figures
    assert figure.get_suptitle() == "runs/night"
    panels = [axes for axes in figure.axes if axes.get_visible()]
    losses, margins, accuracies, norms, rates = panels
    titles = [axes.get_title("left") for axes in panels]
    assert titles == ["Loss", "Reward margin", "Reward accuracy", "Gradient norm", "Learning rate"]
    # Per layer training and held-out pairs, the final layer last.
    assert [line.get_xdata().tolist() for line in losses.lines] == [[1, 2, 3], [0, 3]] * 3
    final_held_out = losses.lines[-1]
    assert final_held_out.get_color() == FINAL.color
    assert final_held_out.get_ydata()[0] == pytest.approx(np.log(2))
    assert margins.lines[-1].get_ydata() == pytest.approx([0.0, 1.0])
    assert accuracies.get_title("right") == "95 % intervals of held-out pairs"
    # Before training there is no accuracy on held-out pairs.
    assert accuracies.lines[-1].get_xdata().tolist() == [3]
    assert [len(axes.lines[0].get_xdata()) for axes in (norms, rates)] == [3, 3]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["layer 15", "layer 22", "final layer"]
    assert legend.get_title().get_text() == "Thin: training. Thick, with dots: held-out pairs."


def test_plain_dpo_without_held_out_pairs(tmp_path: Path, saved_figures: list[Figure]) -> None:
    draw_curves(write_metrics(tmp_path / "m.jsonl", 40, [], []), tmp_path / "c.png")
    (figure,) = saved_figures
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "Thin: training, running means of 3 logged steps."
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [40]
    assert len(figure.axes[0].collections) == 1, "the extent of the logged values"


@pytest.mark.parametrize(
    ("steps", "layers", "evaluations"),
    [(1, [], []), (1, [22], [0, 1]), (900, list(range(2, 26, 2)), list(range(0, 901, 5)))],
)
@pytest.mark.filterwarnings("error")
def test_any_run_can_be_drawn(
    tmp_path: Path,
    saved_figures: list[Figure],
    steps: int,
    layers: list[int],
    evaluations: list[int],
) -> None:
    metrics = write_metrics(tmp_path / "m.jsonl", steps, layers, evaluations)
    draw_curves(metrics, tmp_path / "c.png")
    (figure,) = saved_figures
    lines = [line for axes in figure.axes for line in axes.lines]
    assert all(len(line.get_xdata()) <= MAX_POINTS for line in lines)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {*(f"layer {layer}" for layer in layers), "final layer"}


@pytest.mark.filterwarnings("error")
def test_gradient_norm_with_a_spike_is_logarithmic(
    tmp_path: Path, saved_figures: list[Figure]
) -> None:
    """The file has null for NaN."""
    lines: list[dict[str, float | None]] = [
        {"step": step, "final_loss": 0.7, "grad_norm": 1.0} for step in range(1, 6)
    ]
    lines += [{"step": 6, "final_loss": 9e9, "grad_norm": 1e5}, {"step": 7, "final_loss": None}]
    draw_curves(write_lines(tmp_path / "m.jsonl", lines), tmp_path / "c.png")
    assert saved_figures[0].axes[1].get_yscale() == "log"


def test_single_diverged_step_does_not_flatten_the_loss(
    tmp_path: Path, saved_figures: list[Figure]
) -> None:
    losses = [500.0 if step == 50 else 0.6 for step in range(200)]
    lines: list[dict[str, float | None]] = [
        {"step": step, "final_loss": loss} for step, loss in enumerate(losses, 1)
    ]
    draw_curves(write_lines(tmp_path / "m.jsonl", lines), tmp_path / "c.png")
    # The running mean around the step is 45.
    assert saved_figures[0].axes[0].get_ylim()[1] < 60


def test_gradient_norm_is_described_for_screen_readers() -> None:
    records = [{"step": 1.0, "grad_norm": 2.5}, {"step": 2000.0, "grad_norm": 0.5}]
    (chart,) = training_charts([training_line(records, "final layer", FINAL)], [GRAD_NORM, LOSS])
    assert chart.title == "Gradient norm"
    assert chart.description == "final layer: training 2.5 at step 1, 0.5 at step 2,000"


def test_lines_are_within_the_axes(tmp_path: Path, saved_figures: list[Figure]) -> None:
    """Lines are not clipped, so that one beyond the axes would cross the page."""
    metrics = write_metrics(tmp_path / "m.jsonl", 60, [3, 30], [0, 30, 60])
    draw_curves(metrics, tmp_path / "c.png")
    for axes in saved_figures[0].axes:
        bottom, top = axes.get_ylim()
        left, right = axes.get_xlim()
        for line in axes.lines:
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            assert (y >= bottom).all() and (y <= top).all(), axes.get_title("left")
            assert (x >= left).all() and (x <= right).all(), axes.get_title("left")


def test_empty_metrics_are_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match=r"metrics\.jsonl: has no metrics to draw"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png")


def test_unwritable_figure_is_reported(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", 1, [], [])
    with pytest.raises(
        ConfigError, match=r"training\.output: cannot write .*metrics\.jsonl/c\.png"
    ):
        draw_curves(metrics, metrics / "c.png")


def test_series_leave_out_unknown_values() -> None:
    records = [{"step": 1.0, "x": 5.0}, {"step": 2.0}, {"step": 3.0, "x": np.nan}]
    series = series_of([*records, {"step": 4.0, "x": 6.0}], "x")
    assert (series.x_S.tolist(), series.y_S.tolist()) == ([1.0, 4.0], [5.0, 6.0])
    assert len(series_of(records, "y")) == len(series_of([], "y")) == 0


@pytest.mark.parametrize("prefix", ["", "layer_3/", "eval_"])
def test_accuracy_leaves_out_ties(prefix: str) -> None:
    names = (f"{prefix}rewards/accuracies", f"{prefix}rewards/margins")
    values = [(0.0, 0.0), (0.0, -1.0), (0.5, 1e-3), (0.1, -3e-8)]
    records = [
        {"step": step, **dict(zip(names, pair, strict=True))}
        for step, pair in enumerate(values, start=1)
    ]
    assert series_of(records, names[0]).x_S.tolist() == [2, 3]
    assert series_of(records, names[1]).x_S.tolist() == [1, 2, 3, 4]


def test_held_out_accuracy_has_its_interval() -> None:
    def record(
        step: float, accuracy: float, margin: float, pairs: float | None
    ) -> dict[str, float]:
        values = {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
        return {"step": step, **values, **({} if pairs is None else {"eval_pairs": pairs})}

    records = [record(0, 0, 0, 40), {"step": 5.0}, record(10, 0.7, 1, 40), record(20, 0.8, 1, None)]
    line = training_line(records, "final layer", FINAL)
    accuracy = line.held_out["accuracy"]
    assert accuracy.low_S is not None and accuracy.high_S is not None
    assert accuracy.x_S.tolist() == [10.0, 20.0]
    low, high = wilson_interval(0.7, 40)
    assert (accuracy.low_S.tolist(), accuracy.high_S.tolist()) == ([low, 0.8], [high, 0.8])

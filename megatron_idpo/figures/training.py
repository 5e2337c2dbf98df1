"""Charts of training: loss, margin, accuracy, gradient norm, learning rate, speed and memory.

Each layer of one run is a line, or the final layer of each of several runs. Training is noisy from
step to step: its lines are thin and running means. Held-out pairs are thicker, with markers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from megatron_idpo.figures.chart import Chart, reference_line, set_count_axis, set_value_axis
from megatron_idpo.figures.numbers import count, decimal
from megatron_idpo.figures.series import Series
from megatron_idpo.figures.style import GRID, Style

LOSS, MARGIN, ACCURACY = "loss", "margin", "accuracy"
GRAD_NORM, LEARNING_RATE, TOKENS_PER_S, PEAK_GB = "norm", "rate", "speed", "memory"
LAYER_QUANTITIES = (LOSS, MARGIN, ACCURACY)

_TITLES = {
    LOSS: ("Loss", ""),
    MARGIN: ("Reward margin", "chosen minus rejected"),
    ACCURACY: ("Reward accuracy", "share of pairs with a margin above 0"),
    GRAD_NORM: ("Gradient norm", "before clipping"),
    LEARNING_RATE: ("Learning rate", ""),
    TOKENS_PER_S: ("Tokens per second", "all devices"),
    PEAK_GB: ("Peak memory", "GB, the fullest rank"),
}
_MAX_MARKERS = 25
_SPIKE = 30
"""Gradient norms are drawn on a logarithmic axis where one is this many times the median."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingLine:
    """A layer of a run, or one of several runs at its final layer."""

    label: str
    style: Style
    is_final: bool
    training: Mapping[str, Series]
    """By the names of this module. Only the final layer has quantities without a layer."""

    held_out: Mapping[str, Series]
    """`LAYER_QUANTITIES`; the accuracy of the final layer with its interval."""


def training_charts(lines: Sequence[TrainingLine], names: Sequence[str]) -> list[Chart]:
    """Charts of the named quantities; one without any value is left out."""
    return [
        chart for name in names if (chart := _chart(_lines_with(lines, name), name)) is not None
    ]


def smoothing_note(lines: Sequence[TrainingLine]) -> str:
    """What thin and thick lines are, for the legend."""
    window = max((line.training[LOSS].window for line in lines), default=1)
    mean = f", running means of {window:,} logged steps" if window > 1 else ""
    has_held_out = any(len(line.held_out[LOSS]) for line in lines)
    return f"Thin: training{mean}." + (" Thick, with dots: held-out pairs." if has_held_out else "")


def _lines_with(lines: Sequence[TrainingLine], name: str) -> list[TrainingLine]:
    return [line for line in lines if name in LAYER_QUANTITIES or line.is_final]


def _chart(lines: Sequence[TrainingLine], name: str) -> Chart | None:
    descriptions = [text for line in lines if (text := _describe(line, name))]
    if not descriptions:
        return None
    title, note = _TITLES[name]
    if name == ACCURACY and any(len(line.held_out[ACCURACY]) for line in lines):
        note = "95 % intervals of held-out pairs"
    elif name == LOSS and not all(line.is_final for line in lines):
        note = "each layer's own"
    last_step = max(
        series.x_S[-1]
        for line in lines
        for series in (*line.training.values(), *line.held_out.values())
        if len(series)
    )

    def draw(axes: Axes) -> None:
        _draw(axes, lines, name)
        set_count_axis(axes, "step", last_step)
        set_value_axis(axes, percent=name == ACCURACY)

    return Chart(name, title, note, "; ".join(descriptions), draw)


def _describe(line: TrainingLine, name: str) -> str:
    """First and last value."""
    parts = []
    for kind, by_name in (("training", line.training), ("held-out pairs", line.held_out)):
        if (series := by_name.get(name)) is not None and len(series):
            ends = [(float(series.x_S[at]), float(series.y_S[at])) for at in (0, -1)]
            texts = [f"{decimal(y, '.4g')} at step {count(x)}" for x, y in ends]
            parts.append(f"{kind} {', '.join(texts)}")
    return f"{line.label}: {', '.join(parts)}" if parts else ""


def _draw(axes: Axes, lines: Sequence[TrainingLine], name: str) -> None:
    """One quantity; limits are set after the lines, because set limits do not grow."""
    if name in (MARGIN, ACCURACY):
        reference_line(axes, 0 if name == MARGIN else 0.5)
    if name == GRAD_NORM:
        _draw_extent(axes, lines, name)  # part of the limits of the norm, not of the loss
    for line in lines:
        width = 1.0 if name in LAYER_QUANTITIES else 1.6
        _plot(axes, line.training[name].smoothed(), line.style, width=width)
        if name in LAYER_QUANTITIES:
            _plot(axes, line.held_out[name], line.style, width=1.8, marked=True)
            draw_intervals(axes, line.held_out[name], line.style)
    if name == LOSS:
        _limit_loss(axes, lines)
    elif name == ACCURACY:
        axes.set_ylim(min(axes.get_ylim()[0], 0.4), 1.03)
    elif name not in LAYER_QUANTITIES:
        axes.set_ylim(bottom=0)
    if name == GRAD_NORM:
        norms = np.concatenate([line.training[name].y_S for line in lines])
        if norms.min() > 0 and norms.max() > _SPIKE * np.median(norms):
            axes.set_yscale("log")
            axes.set_ylim(float(norms.min()), float(norms.max()))


def _limit_loss(axes: Axes, lines: Sequence[TrainingLine]) -> None:
    """A single diverged step must not flatten the rest of the run."""
    limits = list(axes.get_ylim())
    _draw_extent(axes, lines, LOSS)
    for line in lines:
        if line.is_final and len(values_S := line.training[LOSS].y_S):
            limits += np.quantile(values_S, (0.01, 0.99)).tolist()
    axes.set_ylim(min(limits), max(limits))


def _draw_extent(axes: Axes, lines: Sequence[TrainingLine], name: str) -> None:
    """Lowest and highest logged values behind the running mean of a single run."""
    final = [line.training[name] for line in lines if line.is_final]
    if len(final) == 1 and final[0].window > 1:
        low, high = final[0].extent()
        axes.fill_between(low.x_S, low.y_S, high.y_S, color=GRID, linewidth=0.8, zorder=0)


def draw_intervals(axes: Axes, series: Series, style: Style) -> None:
    """Vertical bars of a series' intervals; nothing for a series without."""
    # Empty bars that are not clipped have an infinite extent, which breaks the layout.
    if len(series) and series.low_S is not None and series.high_S is not None:
        bars = (series.x_S, series.low_S, series.high_S)
        axes.vlines(*bars, color=style.color, linewidth=1, clip_on=False)


def _plot(axes: Axes, series: Series, style: Style, *, width: float, marked: bool = False) -> None:
    if not len(series):
        return  # an empty line that is not clipped breaks the layout as well
    drawn = series.thinned()
    has_markers = len(series) == 1 or (marked and len(series) <= _MAX_MARKERS)
    look = style.line(marked=has_markers)
    axes.plot(drawn.x_S, drawn.y_S, linewidth=width, markersize=5, clip_on=False, **look)

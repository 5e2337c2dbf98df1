"""Training as charts: loss, margin, accuracy, gradient norm and speed over the steps.

Of one run every layer is a line; of several each run is one, at its final layer. Training is noisy
from step to step: its lines are thin and running means. Held-out pairs have marks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from megatron_idpo.evaluate.report.charts import (
    FINAL,
    QUIET,
    Style,
    count_axis,
    layer_styles,
    new_chart,
    series_style,
    to_svg,
    value_axis,
)
from megatron_idpo.evaluate.report.format import count, decimal
from megatron_idpo.evaluate.report.inputs import Found
from megatron_idpo.figures.series import HeldOutAccuracy, Series
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    FINAL_LOSS,
    GRAD_NORM,
    LOSS,
    MARGIN,
    PEAK_GB,
    TOKENS_PER_S,
    layer_name,
)

DRAWN_LAYERS = 6
"""Intermediate layers that a chart has lines for."""

_DRAWN_POINTS = 240
_FEW_POINTS = 25


@dataclass(frozen=True, slots=True)
class Line:
    """A layer of a run, or the final layer of one of several."""

    label: str
    records: Sequence[Record]
    layer: int | None
    """None: the final one."""

    style: Style

    def name(self, quantity: str) -> str:
        """What the quantity is called in the records."""
        if self.layer is not None:
            return layer_name(self.layer, quantity)
        return FINAL_LOSS if quantity == LOSS else quantity


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart with what stands above it."""

    title: str
    note: str
    svg: str


def drawn_layers(layers: Sequence[int]) -> list[int]:
    """The intermediate layers that have lines: all, or some from the first to the last."""
    if len(layers) <= DRAWN_LAYERS:
        return list(layers)
    return [layers[round(location)] for location in np.linspace(0, len(layers) - 1, DRAWN_LAYERS)]


def training_lines(runs: Sequence[Found]) -> list[Line]:
    """The lines of all charts: layers of a run by itself, else runs."""
    trained = [run for run in runs if run.records]
    if len(runs) > 1:
        return [
            Line(run.label, run.records, None, series_style(number))
            for number, run in enumerate(runs)
            if run.records
        ]
    if not trained:
        return []
    records = trained[0].records
    styles = layer_styles(drawn_layers(trained[0].layers))
    lines = [Line(f"layer {layer}", records, layer, style) for layer, style in styles.items()]
    return [*lines, Line("final layer", records, None, FINAL)]


def training_charts(runs: Sequence[Found]) -> list[Chart]:
    """Loss, margin, accuracy and gradient norm; those that something was logged of."""
    lines = training_lines(runs)
    accuracy_note, final = _accuracy_note(lines), _final(lines)
    drawn = [
        _chart(lines, "loss", "Loss", _loss_note(lines), LOSS, _draw_both),
        _chart(lines, "margin", "Reward margin", "chosen minus rejected", MARGIN, _draw_margin),
        _chart(lines, "accuracy", "Reward accuracy", accuracy_note, ACCURACY, _draw_accuracy),
        _chart(final, "norm", "Gradient norm", "before clipping", GRAD_NORM, _draw_plain),
    ]
    return [chart for chart in drawn if chart is not None]


def speed_charts(runs: Sequence[Found]) -> list[Chart]:
    """Throughput and memory over the steps."""
    lines = _final(training_lines(runs))
    drawn = [
        _chart(lines, "speed", "Tokens per second", "all devices", TOKENS_PER_S, _draw_plain),
        _chart(lines, "memory", "Peak memory", "GB, the fullest rank", PEAK_GB, _draw_plain),
    ]
    return [chart for chart in drawn if chart is not None]


def _final(lines: Sequence[Line]) -> list[Line]:
    """A line for each run, where a quantity has no layers."""
    return [line for line in lines if line.layer is None]


def _chart(
    lines: Sequence[Line],
    name: str,
    title: str,
    note: str,
    quantity: str,
    draw: Callable[[Axes, Line, str], None],
) -> Chart | None:
    """One chart; None where nothing was logged."""
    message = [words for line in lines if (words := _describe(line, quantity))]
    if not message:
        return None
    figure, axes = new_chart()
    for line in lines:
        draw(axes, line, quantity)
    # Only now: a limit that is set keeps later lines from widening the axis.
    if quantity == ACCURACY:
        axes.set_ylim(min(axes.get_ylim()[0], 0.4), 1.03)
    elif draw is _draw_plain:
        axes.set_ylim(bottom=0)
    last = max(record[STEP] for line in lines for record in line.records)
    count_axis(axes, "step", last)
    value_axis(axes, percent=quantity == ACCURACY)
    svg = to_svg(
        figure, f"train-{name}", title=f"{title} over steps", description="; ".join(message)
    )
    return Chart(title, note, svg)


def _describe(line: Line, quantity: str) -> str:
    """How a line goes, in words."""
    parts = []
    for prefix, pairs in (("", "training"), (EVAL, "held-out pairs")):
        series = Series.of(line.records, f"{prefix}{line.name(quantity)}")
        if len(series):
            values = [decimal(float(value), ".4g") for value in series.values_S[[0, -1]]]
            steps = [count(float(step)) for step in series.steps_S[[0, -1]]]
            parts.append(f"{pairs} {values[0]} at step {steps[0]}, {values[1]} at step {steps[1]}")
    return f"{line.label}: {', '.join(parts)}" if parts else ""


def _loss_note(lines: Sequence[Line]) -> str:
    return "each layer's own" if any(line.layer is not None for line in lines) else ""


def _accuracy_note(lines: Sequence[Line]) -> str:
    pairs = {HeldOutAccuracy.of(line.records).pairs for line in lines} - {0}
    if not pairs:
        return "share of pairs with a margin above 0"
    message = f"{pairs.pop():,} pairs" if len(pairs) == 1 else "each run's pairs"
    return f"held out: 95 % intervals of {message}"


def _draw_plain(axes: Axes, line: Line, quantity: str) -> None:
    """What held-out pairs have not."""
    _plot(axes, Series.of(line.records, quantity).smoothed(), line.style, width=1.6)


def _draw_both(axes: Axes, line: Line, quantity: str) -> None:
    """Training thin, held-out pairs with marks."""
    name = line.name(quantity)
    _plot(axes, Series.of(line.records, name).smoothed(), line.style, width=1.0)
    held_out = Series.of(line.records, f"{EVAL}{name}")
    _plot(axes, held_out, line.style, width=1.8, marked=True)


def _draw_margin(axes: Axes, line: Line, quantity: str) -> None:
    axes.axhline(0, color=QUIET, linewidth=1, zorder=0.5)
    _draw_both(axes, line, quantity)


def _draw_accuracy(axes: Axes, line: Line, quantity: str) -> None:
    """With intervals of the final layer; those of all layers would hide each other."""
    axes.axhline(0.5, color=QUIET, linewidth=1, zorder=0.5)
    _draw_both(axes, line, quantity)
    if line.layer is None:
        found = HeldOutAccuracy.of(line.records)
        if found.pairs:
            colour = line.style.colour
            bars = (found.shares.steps_S, found.low_S, found.high_S)
            axes.vlines(*bars, color=colour, linewidth=1, clip_on=False)


def _plot(axes: Axes, series: Series, style: Style, *, width: float, marked: bool = False) -> None:
    """A line through as many points as are told apart; marks where they have room."""
    index = np.arange(len(series))
    if len(series) > _DRAWN_POINTS:
        index = np.linspace(0, len(series) - 1, _DRAWN_POINTS).round().astype(np.int64)
    has_marks = len(series) == 1 or (marked and len(series) <= _FEW_POINTS)
    axes.plot(
        series.steps_S[index],
        series.values_S[index],
        color=style.colour,
        linestyle=style.linestyle,
        linewidth=width,
        marker=style.marker if has_marks else "",
        markersize=5,
        clip_on=False,
    )

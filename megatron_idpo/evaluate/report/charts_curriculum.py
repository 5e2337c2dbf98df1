"""The steps of an sDPO run as charts: what each learnt from, and what its result is worth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from megatron_idpo.evaluate.report.charts import (
    QUIET,
    Style,
    new_chart,
    series_style,
    to_svg,
    value_axis,
)
from megatron_idpo.evaluate.report.charts_training import Chart
from megatron_idpo.evaluate.report.format import count, decimal
from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, MARGIN

AGAINST = (("", "its own reference"), (FIRST, "the first model"))
"""Prefix of names, and what a step's result is compared to."""


def against_styles() -> list[tuple[str, str, Style]]:
    """`AGAINST` with how each is drawn."""
    return [(prefix, message, series_style(n)) for n, (prefix, message) in enumerate(AGAINST)]


def curriculum_charts(manifest: Manifest, name: str) -> list[Chart]:
    """Accuracy and margin of each step's result on held-out pairs; those that were measured.

    Args:
        manifest: the run's.
        name: tells its charts from another run's.
    """
    notes = {ACCURACY: "held-out pairs, 95 % intervals", MARGIN: "held-out pairs"}
    titles = {ACCURACY: "Reward accuracy", MARGIN: "Reward margin"}
    return [
        _chart(manifest, quantity, f"{name}-{number}", titles[quantity], notes[quantity])
        for number, quantity in enumerate((ACCURACY, MARGIN))
        if any(f"{EVAL}{quantity}" in step.metrics for step in manifest.steps)
    ]


def _chart(manifest: Manifest, quantity: str, name: str, title: str, note: str) -> Chart:
    figure, axes = new_chart()
    axes.axhline(0.5 if quantity == ACCURACY else 0, color=QUIET, linewidth=1, zorder=0.5)
    message = []
    for number, (prefix, against, style) in enumerate(against_styles()):
        points = _points(manifest, prefix, quantity)
        if points:
            _draw(axes, points, style, shift=0.05 * (2 * number - 1))
            values = [f"step {step} {decimal(value)}" for step, value, _, _ in points]
            message.append(f"against {against}: {', '.join(values)}")
    steps = np.arange(1, len(manifest.steps) + 1)
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_xticks(steps, [f"step {count(float(step))}" for step in steps])
    if quantity == ACCURACY:
        axes.set_ylim(min(axes.get_ylim()[0], 0.4), 1.03)
    value_axis(axes, percent=quantity == ACCURACY)
    svg = to_svg(figure, name, title=f"{title} after each step", description="; ".join(message))
    return Chart(title, note, svg)


def _points(
    manifest: Manifest, prefix: str, quantity: str
) -> Sequence[tuple[int, float, float, float]]:
    """Step, value and interval, where the value means something."""
    found = []
    for number, step in enumerate(manifest.steps, start=1):
        value = step.metrics.get(f"{prefix}{EVAL}{quantity}")
        if value is None:
            continue
        low = high = value
        if quantity == ACCURACY:
            if is_tied(value, step.metrics.get(f"{prefix}{EVAL}{MARGIN}")):
                continue
            pairs = step.metrics.get(f"{prefix}{EVAL_PAIRS}")
            if pairs:
                low, high = wilson_interval(value, pairs)
        found.append((number, value, low, high))
    return found


def _draw(
    axes: Axes, points: Sequence[tuple[int, float, float, float]], style: Style, shift: float
) -> None:
    steps, values, lows, highs = (np.array(column) for column in zip(*points, strict=True))
    axes.vlines(steps + shift, lows, highs, color=style.colour, linewidth=1.2)
    axes.plot(
        steps + shift,
        values,
        color=style.colour,
        linestyle=style.linestyle,
        linewidth=1.4,
        marker=style.marker,
        markersize=6,
    )

"""The steps of a run as a picture: their pairs, the first model's accuracy, what each step gained.

Drawn from the manifest, without a display.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_idpo.errors import ConfigError
from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, MARGIN

_AGAINST = (("", "its own reference", "#4c4c9f"), (FIRST, "the first model", "#c2570c"))
"""Prefix of names, what it is called, its colour."""

_LONGEST_NAME = 28


def draw_curriculum(manifest: Manifest, target: Path) -> None:
    """Writes the picture as a PNG file, 1,800 × 1,200 pixels.

    Raises:
        ConfigError: it cannot be written.
    """
    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    (pairs_axes, first_axes), (accuracy_axes, margin_axes) = figure.subplots(2, 2)
    _draw_pairs(pairs_axes, manifest)
    _draw_first_model(first_axes, manifest)
    _draw_figures(accuracy_axes, manifest, ACCURACY)
    _draw_figures(margin_axes, manifest, MARGIN)
    for axes in (pairs_axes, accuracy_axes, margin_axes):
        axes.set_xlabel("step", fontsize=9)
        axes.set_xlim(0.4, len(manifest.steps) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="0.93", linewidth=0.8)
    for axes in (pairs_axes, first_axes, accuracy_axes, margin_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    try:
        figure.savefig(target)
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}"
        raise ConfigError.at("training.output", message, "name a directory to write to") from None


def _draw_pairs(axes: Axes, manifest: Manifest) -> None:
    """How many pairs each step has, from which sources."""
    steps = np.arange(1, len(manifest.steps) + 1)
    below = np.zeros(len(steps))
    for colour, source in zip(_colours(manifest), manifest.accuracy, strict=True):
        counts = np.array([step.sources.get(source, 0) for step in manifest.steps])
        label = _short_name(source)
        axes.bar(steps, counts, 0.6, bottom=below, color=colour, label=label)
        below += counts
    axes.set_ylabel("pairs", fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(0, 1.25 * below.max())
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_first_model(axes: Axes, manifest: Manifest) -> None:
    """What share of each source the first model gets right already."""
    names = [_short_name(source) for source in manifest.accuracy]
    locations = np.arange(len(names))
    axes.barh(locations, list(manifest.accuracy.values()), 0.6, color=_colours(manifest))
    axes.set_yticks(locations, names)
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.axvline(0.5, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("first model's reward accuracy, without a reference", fontsize=9)


def _draw_figures(axes: Axes, manifest: Manifest, name: str) -> None:
    """Accuracy or margin of each step's result on held-out pairs, against both references."""
    for number, (prefix, against, colour) in enumerate(_AGAINST):
        shift = 0.06 * (2 * number - 1)
        points = [
            (step_number + shift, step.metrics[f"{prefix}{EVAL}{name}"], step)
            for step_number, step in enumerate(manifest.steps, start=1)
            if f"{prefix}{EVAL}{name}" in step.metrics
        ]
        steps, values = [point[0] for point in points], [point[1] for point in points]
        label = f"against {against}"
        axes.plot(steps, values, "o--", color=colour, linewidth=1.2, markersize=5, label=label)
        if name == ACCURACY:
            bounds = [
                wilson_interval(value, step.metrics[f"{prefix}{EVAL_PAIRS}"])
                for _, value, step in points
            ]
            for location, (low, high) in zip(steps, bounds, strict=True):
                axes.plot([location, location], [low, high], color=colour, linewidth=0.9)
    if name == ACCURACY:
        axes.axhline(0.5, color="0.75", linewidth=0.8, zorder=0)
        axes.set_ylim(min(axes.get_ylim()[0], 0.3), 1.02)
        axes.set_ylabel("accuracy on held-out pairs, 95% interval", fontsize=9)
    else:
        axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
        axes.set_ylabel("reward margin on held-out pairs", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _colours(manifest: Manifest) -> Sequence[tuple[float, float, float, float]]:
    """One for each source."""
    return [
        colormaps["viridis"](location)
        for location in np.linspace(0.15, 0.85, len(manifest.accuracy))
    ]


def _short_name(source: str) -> str:
    """The end of a path, which tells it from others; a dollar sign begins no formula."""
    end = source if len(source) <= _LONGEST_NAME else f"…{source[1 - _LONGEST_NAME :]}"
    return end.replace("$", r"\$")

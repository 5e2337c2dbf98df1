"""The figure of `megatron-idpo data`: lengths of prompts and answers, and how full rows are.

Shapes: P pairs; R rows.
"""

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from megatron_idpo.figures.chart import SMALL, Chart, label_x_axis, save_charts, set_value_axis
from megatron_idpo.figures.numbers import percent
from megatron_idpo.figures.series import Floats
from megatron_idpo.figures.style import INK, series_style

PARTS = ("prompt", "chosen", "rejected")
_LENGTH_BINS = 25
_FILL_BINS = 40


def draw_data_lengths(
    path: Path, lengths_P3: NDArray[np.integer], fill_R: Floats, fill: float, *, title: str
) -> None:
    """Write the figure as a PNG, 1,800 × 600 pixels.

    Args:
        path: the file; its directory is created if needed.
        lengths_P3: tokens of prompt, chosen and rejected answer of each pair.
        fill_R: share of each row that holds tokens.
        fill: the same of all rows together.
        title: the data's name.

    Raises:
        ConfigError: the file cannot be written.
    """
    fill_note = f"rows; line: {percent(fill, 1)} overall"
    charts = [
        Chart("lengths", "Lengths", "pairs", "", partial(_draw_lengths, lengths_P3=lengths_P3)),
        Chart("fill", "Row fill", fill_note, "", partial(_draw_fill, fill_R=fill_R, fill=fill)),
    ]
    save_charts(charts, path, title=title)


def _draw_lengths(axes: Axes, lengths_P3: NDArray[np.integer]) -> None:
    """Histograms over a logarithmic axis: short answers and the long tail are both visible."""
    low, high = int(lengths_P3.min()), int(lengths_P3.max())
    edges = np.unique(np.geomspace(max(1, low), high + 1, _LENGTH_BINS + 1).round())
    for index, name in enumerate(PARTS):
        lengths_P, style = lengths_P3[:, index], series_style(index)
        median = int(np.quantile(lengths_P, 0.5, method="inverted_cdf"))
        counts, _ = np.histogram(lengths_P, edges)
        label = f"{name}, median {median:,}"
        look = style.line(marked=False)
        axes.step(edges, [*counts, 0], where="post", linewidth=1.6, label=label, **look)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label_x_axis(axes, "tokens")
    set_value_axis(axes)
    axes.legend(frameon=False, fontsize=SMALL)


def _draw_fill(axes: Axes, fill_R: Floats, fill: float) -> None:
    percent_R = 100 * fill_R
    lowest = min(10 * np.floor(percent_R.min() / 10), 90)
    edges = np.linspace(lowest, 100, _FILL_BINS + 1)
    axes.hist(percent_R, edges.tolist(), color=series_style(3).color)
    axes.axvline(100 * fill, color=INK, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_x_axis(axes, "% of a row that holds tokens")
    set_value_axis(axes)

"""The picture of `megatron-idpo data`: how long the parts are, and how full the rows.

Drawn without a display and without matplotlib's global state. Colours are told apart by every kind
of colour vision, and the lines by their dashes too.

Shapes: P pairs; R rows.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_idpo.data.inspect.statistics import RowFigures
from megatron_idpo.data.tokenize.pair import IntArray
from megatron_idpo.errors import ConfigError

PARTS = (
    ("prompt", "#777777", ":"),
    ("chosen", "#1b9e77", "-"),
    ("rejected", "#d95f02", "--"),
)
_LENGTH_BINS = 25
_FILL_BINS = 40


def save_picture(path: Path, lengths_P3: IntArray, rows: RowFigures, title: str) -> None:
    """Writes the picture as a PNG file, 1,500 × 570 pixels.

    Args:
        path: the file; its directory is made if need be.
        lengths_P3: int [P, 3], prompt/chosen/rejected lengths of all pairs.
        rows: the rows of the steps looked at.
        title: what it shows.

    Raises:
        ConfigError: it cannot be written there.
    """
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    lengths_axes, fill_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_lengths(lengths_axes, lengths_P3)
    _draw_fill(fill_axes, rows)
    thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
    lengths_axes.xaxis.set_major_formatter(thousands)
    for axes in (lengths_axes, fill_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(steps=(1, 2, 5, 10), integer=True))
        axes.yaxis.set_major_formatter(thousands)
        axes.tick_params(labelsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise ConfigError.at("training.output", message, "name a directory to write to") from None


def _draw_lengths(axes: Axes, lengths_P3: IntArray) -> None:
    """Lengths on a logarithmic axis: the long tail and the short answers are both seen."""
    lowest, highest = int(lengths_P3.min()), int(lengths_P3.max())
    edges = np.unique(np.geomspace(max(1, lowest), highest + 1, _LENGTH_BINS + 1).round())
    for column, (name, colour, dashes) in enumerate(PARTS):
        lengths_P = lengths_P3[:, column]
        median = int(np.quantile(lengths_P, 0.5, method="inverted_cdf"))
        counts, _ = np.histogram(lengths_P, edges)
        axes.step(
            edges,
            [*counts, 0],
            where="post",
            color=colour,
            linestyle=dashes,
            linewidth=1.6,
            label=f"{name}, median {median:,}",
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel("pairs", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _draw_fill(axes: Axes, rows: RowFigures) -> None:
    percent_R = 100 * rows.fill_R
    lowest = 10 * np.floor(percent_R.min() / 10)
    edges = np.linspace(min(lowest, 90), 100, _FILL_BINS + 1)
    axes.hist(percent_R, edges.tolist(), color="#7570b3")
    axes.axvline(100 * rows.fill, color="black", linewidth=1)
    axes.annotate(
        f"{rows.fill:.1%} overall ",
        (100 * rows.fill, 1),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        fontsize=8,
    )
    axes.set_xlabel("% of a row that holds tokens", fontsize=9)
    axes.set_ylabel("rows", fontsize=9)

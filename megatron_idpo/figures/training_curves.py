"""The picture of a run: losses, margins, accuracies and the optimizer, from its metrics file.

Drawn without a display and without matplotlib's global state. A layer has one colour in all panels,
from dark near the input to green near the output; the final layer is black. Training is noisy from
step to step, so its lines are running means; dashes and dots are held-out pairs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.figures.series import HeldOutAccuracy, Series
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    FINAL_LOSS,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    MARGIN,
    layer_name,
    layers_in,
)

_FINAL_COLOUR = "black"
_RATE_COLOUR = "#c2570c"
_DOTTED_POINTS = 25
"""Lines of so few points show where they are."""

_FEW_LINES = 5

Lines = Mapping[str, tuple[str, float]]
"""By name of a quantity: its colour and width. The final layer's comes last, on top."""


def draw_curves(metrics_path: Path, target: Path, *, title: str = "") -> None:
    """Writes the picture as a PNG file, 1,800 × 1,200 pixels.

    Args:
        metrics_path: the run's metrics file, of any length.
        target: the file; its directory is made if need be.
        title: what it shows.

    Raises:
        ConfigError: the metrics cannot be read, or the picture not be written.
        DataError: nothing was logged.
    """
    records = read_metrics(metrics_path)
    if not records:
        raise DataError.at(str(metrics_path), "has no metrics to draw", "train at least one step")
    layers = layers_in(name for record in records for name in record)
    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    (loss_axes, margin_axes), (accuracy_axes, optimizer_axes) = figure.subplots(2, 2)
    _draw_losses(loss_axes, records, layers)
    _draw_quantity(margin_axes, records, _lines(layers, MARGIN))
    margin_axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    margin_axes.set_ylabel("reward margin", fontsize=9)
    _draw_accuracy(accuracy_axes, records, layers)
    all_axes = [loss_axes, margin_axes, accuracy_axes, optimizer_axes]
    all_axes.append(_draw_optimizer(optimizer_axes, records))
    last_step = max(record[STEP] for record in records)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(0, max(last_step, 1) * 1.01)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(labelsize=8)
    all_axes[-1].spines["right"].set_visible(True)
    all_axes[-1].grid(visible=False)
    _add_legend(figure, records, layers)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}"
        raise ConfigError.at("training.output", message, "name a directory to write to") from None


def layer_colours(layers: Sequence[int]) -> dict[int, str]:
    """A colour for each intermediate layer, told apart by every kind of colour vision."""
    locations = [0.45] if len(layers) == 1 else np.linspace(0.2, 0.85, len(layers))
    colours = [to_hex(colormaps["viridis"](location)) for location in locations]
    return dict(zip(layers, colours, strict=True))


def _lines(layers: Sequence[int], name: str, final_name: str | None = None) -> Lines:
    colours = layer_colours(layers)
    width = 1.6 if len(layers) < _FEW_LINES else 1.1
    lines = {layer_name(layer, name): (colours[layer], width) for layer in layers}
    return {**lines, final_name or name: (_FINAL_COLOUR, 1.8)}


def _draw_quantity(
    axes: Axes, records: Sequence[Record], lines: Lines, *, held_out: bool = True
) -> None:
    """A quantity of all layers, in training and on held-out pairs."""
    for name, (colour, width) in lines.items():
        _plot(axes, Series.of(records, name).smoothed(), colour, width)
        evaluated = Series.of(records, f"{EVAL}{name}").thinned()
        if held_out and len(evaluated):
            axes.plot(
                evaluated.steps_S,
                evaluated.values_S,
                color=colour,
                linewidth=0.7 * width,
                # With many layers the lines of training already lead from point to point.
                linestyle="--" if len(lines) <= _FEW_LINES or colour == _FINAL_COLOUR else "",
                marker="o",
                markersize=2 + width if len(evaluated) <= 2 * _DOTTED_POINTS else 0,
                clip_on=False,
            )


def _plot(axes: Axes, line: Series, colour: object, width: float, style: str = "-") -> None:
    """A line of training; short ones with their points."""
    drawn = line.thinned()
    marker = "." if len(line) <= _DOTTED_POINTS else ""
    axes.plot(
        drawn.steps_S, drawn.values_S, color=colour, linewidth=width, linestyle=style, marker=marker
    )


def _draw_extent(axes: Axes, line: Series) -> None:
    """What single steps said, behind their running mean, where there is one."""
    if line.window > 1:
        steps, low, high = line.extent()
        axes.fill_between(steps, low, high, color="0.88", linewidth=0.8, edgecolor="0.88", zorder=0)


def _draw_losses(axes: Axes, records: Sequence[Record], layers: Sequence[int]) -> None:
    lines = _lines(layers, LOSS, FINAL_LOSS)
    combined = Series.of(records, LOSS)
    _draw_quantity(axes, records, lines)
    low, high = axes.get_ylim()
    _draw_extent(axes, combined)
    if len(combined):
        # One step out of a hundred may be anywhere without flattening all others.
        least, most = np.quantile(combined.values_S, (0.01, 0.99))
        axes.set_ylim(min(low, least), max(high, most))
    axes.set_ylabel("loss", fontsize=9)


def _draw_accuracy(axes: Axes, records: Sequence[Record], layers: Sequence[int]) -> None:
    _draw_quantity(axes, records, _lines(layers, ACCURACY), held_out=False)
    found = HeldOutAccuracy.of(records)
    shares = found.shares
    if len(shares):
        interval = (shares.values_S - found.low_S, found.high_S - shares.values_S)
        message = f", 95% interval of {found.pairs:,} pairs" if found.pairs else ""
        axes.errorbar(
            shares.steps_S,
            shares.values_S,
            yerr=interval,
            color=_RATE_COLOUR,
            linestyle="--",
            linewidth=1.2,
            marker="o",
            markersize=4,
            capsize=2.5,
            elinewidth=0.9,
            clip_on=False,
            label=f"held out, final layer{message}",
        )
        axes.legend(frameon=False, fontsize=8, loc="best")
    axes.axhline(0.5, color="0.75", linewidth=0.8, zorder=0)
    low, _ = axes.get_ylim()
    axes.set_ylim(min(low, 0.4), 1.02)
    axes.set_ylabel("reward accuracy", fontsize=9)


def _draw_optimizer(axes: Axes, records: Sequence[Record]) -> Axes:
    """The gradient's norm, and the learning rate on an axis of its own, which is returned."""
    norms = Series.of(records, GRAD_NORM)
    _plot(axes, norms.smoothed(), "#4c4c9f", 1.5)
    _draw_extent(axes, norms)
    positive = len(norms) > 0 and norms.values_S.min() > 0
    if positive and norms.values_S.max() > 30 * np.median(norms.values_S):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("gradient norm", fontsize=9, color="#4c4c9f")
    rate_axes = axes.twinx()
    _plot(rate_axes, Series.of(records, LEARNING_RATE), _RATE_COLOUR, 1.2, "-.")
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("learning rate", fontsize=9, color=_RATE_COLOUR)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate_axes.yaxis.get_offset_text().set_fontsize(8)
    return rate_axes


def _add_legend(figure: Figure, records: Sequence[Record], layers: Sequence[int]) -> None:
    """Colours and dashes, which mean the same in all panels."""
    window = Series.of(records, LOSS).window
    mean = f"training, mean of {window:,} logged steps" if window > 1 else "training"
    handles = [Line2D([], [], color=_FINAL_COLOUR, linewidth=1.8, label=mean)]
    if window > 1:
        handles.append(Line2D([], [], color="0.85", linewidth=6, label="as logged"))
    if any(f"{EVAL}{LOSS}" in record for record in records):
        label, marker = "held-out pairs", "o"
        handles.append(
            Line2D([], [], color=_FINAL_COLOUR, linestyle="--", marker=marker, label=label)
        )
    if layers:
        handles += [
            Line2D([], [], color=colour, linewidth=3, label=f"layer {layer}")
            for layer, colour in layer_colours(layers).items()
        ]
        handles.append(Line2D([], [], color=_FINAL_COLOUR, linewidth=3, label="final layer"))
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)

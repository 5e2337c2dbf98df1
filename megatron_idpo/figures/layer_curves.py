"""Layer curves as a picture: Fig. 3 of the intermediate-DPO paper, and what goes with it.

Drawn without a display and without matplotlib's global state. A model has one colour and one
marker in all panels; bands are 95 % intervals.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.result_files import appearing

PICTURES = ("likelihood.png", "likelihood.svg")

_PANELS = (
    ("likelihood", "DPO likelihood, mean of sigma(margin)", 0.5),
    ("margin", "margin against the reference", 0.0),
    ("accuracy", "accuracy against the reference", 0.5),
    ("own_accuracy", "accuracy of the layer by itself", 0.5),
)
"""Quantity, what it is called, where nothing is known."""

COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Grey, then Okabe and Ito's, which every kind of colour vision tells apart."""

_MARKERS = "osD^vP"
"""One fewer than colours, so that both together tell 42 models apart."""


def draw_likelihood(curves: Sequence[LayerCurves], target: Path) -> None:
    """Writes the picture, as PNG (1,800 × 1,350 pixels) or SVG by the name's ending.

    Raises:
        ConfigError: it cannot be written.
    """
    figure = Figure(figsize=(12, 9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    for axes, (name, label, nothing) in zip(panels, _PANELS, strict=True):
        for number, model in enumerate(curves):
            _draw(axes, model, name, number)
        axes.axhline(nothing, color="0.75", linewidth=0.8, zorder=0)
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("layer", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="0.93", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel(f"{curves[0].format_sample}; bands: 95% intervals", fontsize=8, color="0.35")
    with appearing(target) as fresh:
        figure.savefig(fresh, format=target.suffix[1:])


def _draw(axes: Axes, model: LayerCurves, name: str, number: int) -> None:
    one, colour = model.estimates[name], COLOURS[number % len(COLOURS)]
    axes.fill_between(model.layers, one.low_L, one.high_L, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        model.layers,
        one.value_L,
        color=colour,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=3.5,
        linewidth=1.5,
        label=model.model,
    )

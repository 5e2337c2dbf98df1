"""Charts of evaluations: layer curves, win rates, and the steps of sDPO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from megatron_idpo.figures.chart import (
    FONT_SIZE,
    SMALL,
    Chart,
    Legend,
    reference_line,
    set_count_axis,
    set_value_axis,
)
from megatron_idpo.figures.numbers import decimal, interval, percent, shorten
from megatron_idpo.figures.series import Floats, Series
from megatron_idpo.figures.style import INK, QUIET, sequential_colors, series_style
from megatron_idpo.figures.training import draw_intervals

# ---- layer curves -----------------------------------------------------------------------------

LAYER_QUANTITIES = {
    "likelihood": ("Preference likelihood", "mean σ(Δ) against the reference"),
    "margin": ("Reward margin", "mean Δ against the reference"),
    "accuracy": ("Reward accuracy", "share of pairs with Δ above 0"),
    "own_accuracy": ("Own accuracy", "chosen more likely per token; no reference"),
    "agreement": ("Agreement", "correlation with the final layer's preference"),
    "nats_per_token": ("Nats per token", "cross-entropy of the answers"),
}
"""Quantity of layer curves -> title and definition."""

MAIN_QUANTITIES = ("likelihood", "margin", "accuracy", "own_accuracy")
"""Shown at once; the others on request."""

OTHER_QUANTITIES = ("agreement", "nats_per_token")

_NO_PREFERENCE = {"likelihood": 0.5, "margin": 0.0, "accuracy": 0.5, "own_accuracy": 0.5}
"""The value of a quantity that prefers neither answer."""

_MAX_MARKERS = 20


type Estimates = Mapping[str, tuple[Floats, Floats, Floats]]
"""Quantity -> value, low, high at layers 1 to L; NaN where it is not known."""


def layer_charts(models: Mapping[str, Estimates], names: Sequence[str]) -> list[Chart]:
    """A chart for each quantity that is known at some layer.

    Args:
        models: label -> layer curves of a model; drawn in the styles of `series_legend`.
        names: of quantities.
    """
    return [
        Chart(
            name,
            *LAYER_QUANTITIES[name],
            "; ".join(_describe_layers(label, *model[name]) for label, model in models.items()),
            partial(_draw_layers, models=models, name=name),
        )
        for name in names
        if any(np.isfinite(model[name][0]).any() for model in models.values())
    ]


def _draw_layers(axes: Axes, models: Mapping[str, Estimates], name: str) -> None:
    if name in _NO_PREFERENCE:
        reference_line(axes, _NO_PREFERENCE[name])
    for index, model in enumerate(models.values()):
        (value_L, low_L, high_L), style = model[name], series_style(index)
        layers = np.arange(1, len(value_L) + 1)
        axes.fill_between(layers, low_L, high_L, color=style.color, alpha=0.16, lw=0)
        every = max(1, len(layers) // _MAX_MARKERS)
        axes.plot(layers, value_L, lw=1.8, markevery=every, markersize=4.5, **style.line())
    set_count_axis(axes, "layer", max(len(model[name][0]) for model in models.values()), first=1)
    set_value_axis(axes, percent=name.endswith("accuracy"))


def _describe_layers(label: str, value_L: Floats, low_L: Floats, high_L: Floats) -> str:
    bounds = interval(float(low_L[-1]), float(high_L[-1]), ".3f")
    first, last = (decimal(float(value)) for value in value_L[[0, -1]])
    within = f" ({bounds})" if bounds else ""
    return f"{label}: {first} at layer 1, {last}{within} at layer {len(value_L)}"


# ---- win rates --------------------------------------------------------------------------------

_ROW_HEIGHT = 46.0
_MAX_TITLE = 46


def win_rate_chart(rates: Mapping[str, tuple[float, float, float]]) -> Chart:
    """Win rates with 95 % intervals, one below the other.

    Args:
        rates: title of a comparison -> win rate of the first model, low, high.
    """
    texts = []
    for title, (rate, low, high) in rates.items():
        bounds = interval(100 * low, 100 * high, ".0f")
        texts.append(f"{title}: {percent(rate)}" + (f" ({bounds} %)" if bounds else ""))
    return Chart(
        "rates",
        "Win rate of the first model",
        "95 % intervals; a tie counts half",
        "; ".join(texts),
        partial(_draw_win_rates, rates=rates),
        34 + _ROW_HEIGHT * len(rates),
    )


def _draw_win_rates(axes: Axes, rates: Mapping[str, tuple[float, float, float]]) -> None:
    axes.grid(visible=False)
    axes.axvline(0.5, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.5)
    color = series_style(0).color
    for at, (title, (rate, low, high)) in enumerate(rates.items()):
        label = axes.text(0, at - 0.2, shorten(title, _MAX_TITLE), fontsize=FONT_SIZE)
        label.set(color=INK, verticalalignment="bottom", parse_math=False)
        axes.plot([low, high], [at, at], color=color, linewidth=2.2)
        axes.plot([rate], [at], "o", color=color, markersize=7.5)
    axes.set_ylim(len(rates) - 0.6, -0.85)
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    # Centered on their ticks, the outermost labels would extend beyond the chart.
    axes.xaxis.get_majorticklabels()[0].set_horizontalalignment("left")
    axes.xaxis.get_majorticklabels()[-1].set_horizontalalignment("right")


# ---- sDPO -------------------------------------------------------------------------------------

REFERENCES: Legend = (
    ("against its own reference", series_style(0)),
    ("against the first model", series_style(1)),
)
_MAX_SOURCE = 28


@dataclass(frozen=True, slots=True, eq=False)
class Curriculum:
    """The steps of an sDPO run in numbers."""

    num_steps: int
    pairs: Mapping[str, Sequence[int]]
    """Source -> pairs in each step."""

    first_accuracy: Mapping[str, float]
    """Source -> reward accuracy of the first model."""

    accuracy: Sequence[Series]
    """Held-out accuracy over steps with its interval, against each of `REFERENCES`."""

    margin: Sequence[Series]


def result_charts(curriculum: Curriculum) -> list[Chart]:
    """Held-out accuracy and margin of each step's result, as far as they were measured."""
    kinds = (
        ("accuracy", "Reward accuracy", "held-out pairs, 95 % intervals", curriculum.accuracy),
        ("margin", "Reward margin", "held-out pairs", curriculum.margin),
    )
    charts = []
    for name, title, note, results in kinds:
        texts = []
        for (label, _), series in zip(REFERENCES, results, strict=True):
            points = zip(series.x_S, series.y_S, strict=True)
            values = ", ".join(f"step {x:.0f} {decimal(float(y))}" for x, y in points)
            texts += [f"{label}: {values}"] if values else []
        draw = partial(_draw_results, results=results, curriculum=curriculum, name=name)
        charts.append(Chart(name, title, note, "; ".join(texts), draw))
    return charts if any(map(len, curriculum.margin)) else []


def data_charts(curriculum: Curriculum) -> list[Chart]:
    """Pairs of each step by source, and the first model's accuracy on each source."""
    return [
        Chart("pairs", "Pairs", "by source", "", partial(_draw_pairs, curriculum=curriculum)),
        Chart(
            "first",
            "First model",
            "reward accuracy, without a reference",
            "",
            partial(_draw_first_accuracy, curriculum=curriculum),
        ),
    ]


def _draw_results(axes: Axes, results: Sequence[Series], curriculum: Curriculum, name: str) -> None:
    reference_line(axes, 0.5 if name == "accuracy" else 0)
    for (_, style), series, shift in zip(REFERENCES, results, (-0.05, 0.05), strict=True):
        if not len(series):
            continue
        # Shifted, so that the intervals of one step do not cover each other.
        shifted = Series(series.x_S + shift, series.y_S, series.low_S, series.high_S)
        draw_intervals(axes, shifted, style)
        axes.plot(shifted.x_S, shifted.y_S, linewidth=1.4, markersize=6, **style.line())
    _set_step_axis(axes, curriculum.num_steps)
    if name == "accuracy":
        axes.set_ylim(min(axes.get_ylim()[0], 0.4), 1.03)
    set_value_axis(axes, percent=name == "accuracy")


def _draw_pairs(axes: Axes, curriculum: Curriculum) -> None:
    steps = np.arange(1, curriculum.num_steps + 1)
    bottom = np.zeros(curriculum.num_steps)
    colors = sequential_colors(len(curriculum.pairs))
    for color, (source, counts) in zip(colors, curriculum.pairs.items(), strict=True):
        axes.bar(steps, counts, 0.6, bottom=bottom, color=color, label=_source_label(source))
        bottom += np.array(counts)
    _set_step_axis(axes, curriculum.num_steps)
    axes.set_ylim(0, 1.25 * bottom.max())
    set_value_axis(axes)
    axes.legend(frameon=False, fontsize=SMALL, loc="upper left", ncols=2)


def _draw_first_accuracy(axes: Axes, curriculum: Curriculum) -> None:
    names = [_source_label(source) for source in curriculum.first_accuracy]
    rows = np.arange(len(names))
    shares = list(curriculum.first_accuracy.values())
    axes.grid(visible=False)
    axes.axvline(0.5, color=QUIET, linewidth=1, zorder=0.5)
    axes.barh(rows, shares, 0.6, color=sequential_colors(len(names)))
    axes.set_yticks(rows, names, fontsize=SMALL)
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _set_step_axis(axes: Axes, num_steps: int) -> None:
    set_count_axis(axes, "sDPO step", num_steps)
    axes.set_xlim(0.5, num_steps + 0.5)


def _source_label(source: str) -> str:
    """The end of a path; `$` escaped, which begins a formula in matplotlib."""
    end = source if len(source) <= _MAX_SOURCE else f"…{source[1 - _MAX_SOURCE :]}"
    return end.replace("$", r"\$")

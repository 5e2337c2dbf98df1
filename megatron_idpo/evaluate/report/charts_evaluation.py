"""Evaluations as charts: what models make of held-out pairs at every layer, and who wins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.report.charts import (
    FONT_SIZE,
    INK,
    QUIET,
    Style,
    count_axis,
    new_chart,
    series_style,
    to_svg,
    value_axis,
)
from megatron_idpo.evaluate.report.charts_training import Chart
from megatron_idpo.evaluate.report.evaluation_inputs import Duel
from megatron_idpo.evaluate.report.format import decimal, interval, percent
from megatron_idpo.evaluate.report.inputs import Found

_EVEN = {"likelihood": 0.5, "margin": 0.0, "accuracy": 0.5, "own_accuracy": 0.5}
"""Where a quantity prefers neither answer."""

SHOWN = {
    "likelihood": ("Preference likelihood", "mean σ(Δ) against the reference"),
    "margin": ("Reward margin", "mean Δ against the reference"),
    "accuracy": ("Reward accuracy", "share of pairs with Δ above 0"),
    "own_accuracy": ("Own accuracy", "chosen likelier per token; no reference"),
    "agreement": ("Agreement", "correlation with the final layer's preference"),
    "nats_per_token": ("Nats per token", "how badly answers are predicted"),
}
"""Quantities of layer curves: what they are called, and what they are."""

LEADING = ("likelihood", "margin", "accuracy", "own_accuracy")
"""Those that are shown at once; others on request."""

_FEW_LAYERS = 20
_ROW = 46.0
_LONGEST = 46


@dataclass(frozen=True, slots=True)
class Curve:
    """A model's layer curves, named and drawn as on the whole page."""

    label: str
    style: Style
    curves: LayerCurves


def layer_lines(runs: Sequence[Found]) -> list[Curve]:
    """The models of all runs; one that runs have read with the same outcome is there once."""
    named: dict[str, LayerCurves] = {}
    for run in runs:
        for curves in run.evaluation.curves:
            twin = next((one for one in named.values() if _same(one, curves)), None)
            if twin is not None:
                continue
            shared = len(runs) > 1 and any(
                _same(curves, one)
                for other in runs
                if other is not run
                for one in other.evaluation.curves
            )
            label = curves.model if shared or len(runs) == 1 else f"{run.label} · {curves.model}"
            named[label if label not in named else f"{run.label} · {curves.model}"] = curves
    return [
        Curve(label, series_style(number), curves)
        for number, (label, curves) in enumerate(named.items())
    ]


def _same(one: LayerCurves, other: LayerCurves) -> bool:
    """Whether it is the same model's reading of the same pairs."""
    if (one.model, one.layers, one.pairs) != (other.model, other.layers, other.pairs):
        return False
    return all(
        np.array_equal(one.estimates[name].value_L, other.estimates[name].value_L, equal_nan=True)
        for name in one.estimates
    )


def layer_charts(lines: Sequence[Curve], names: Sequence[str]) -> list[Chart]:
    """A chart for each of the quantities that is known at some layer."""
    return [
        _layer_chart(lines, name)
        for name in names
        if any(np.isfinite(line.curves.estimates[name].value_L).any() for line in lines)
    ]


def _layer_chart(lines: Sequence[Curve], name: str) -> Chart:
    title, note = SHOWN[name]
    figure, axes = new_chart()
    if name in _EVEN:
        axes.axhline(_EVEN[name], color=QUIET, linewidth=1, zorder=0.5)
    message = []
    for line in lines:
        estimate, layers = line.curves.estimates[name], np.array(line.curves.layers)
        colour = line.style.colour
        axes.fill_between(layers, estimate.low_L, estimate.high_L, color=colour, alpha=0.16, lw=0)
        axes.plot(
            layers,
            estimate.value_L,
            color=colour,
            linestyle=line.style.linestyle,
            linewidth=1.8,
            marker=line.style.marker if len(layers) <= _FEW_LAYERS else "",
            markevery=max(1, len(layers) // _FEW_LAYERS),
            markersize=4.5,
        )
        ends = [decimal(float(value)) for value in estimate.value_L[[0, -1]]]
        bounds = interval(float(estimate.low_L[-1]), float(estimate.high_L[-1]), ".3f")
        within = f" ({bounds})" if bounds else ""
        message.append(
            f"{line.label}: {ends[0]} at layer 1, {ends[1]}{within} at layer {layers[-1]}"
        )
    count_axis(axes, "layer", max(line.curves.layers[-1] for line in lines), first=1)
    value_axis(axes, percent=name.endswith("accuracy"))
    svg = to_svg(figure, f"layer-{name}", title=f"{title} by layer", description="; ".join(message))
    return Chart(title, note, svg)


def duels_of(runs: Sequence[Found]) -> list[tuple[str, Duel]]:
    """The comparisons of all runs, each with a title; the run's name where several have some."""
    judged = [run for run in runs if run.evaluation.duels]
    return [
        (f"{run.label}: " * (len(judged) > 1) + f"{duel.a} against {duel.b}", duel)
        for run in judged
        for duel in run.evaluation.duels
    ]


def duel_chart(duels: Sequence[tuple[str, Duel]]) -> Chart:
    """Win rates with their intervals, one below the other, and where neither side wins."""
    figure, axes = new_chart(34 + _ROW * len(duels))
    axes.grid(visible=False)
    axes.axvline(0.5, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.5)
    message = []
    for row, (title, duel) in enumerate(duels):
        label = axes.text(0, row - 0.2, _shortened(title), fontsize=FONT_SIZE, color=INK)
        label.set(verticalalignment="bottom", parse_math=False)
        colour = series_style(0).colour
        axes.plot([duel.low, duel.high], [row, row], color=colour, linewidth=2.2)
        axes.plot([duel.rate], [row], "o", color=colour, markersize=7.5)
        bounds = interval(100 * duel.low, 100 * duel.high, ".0f")
        message.append(f"{title}: {percent(duel.rate)}" + (f" ({bounds} %)" if bounds else ""))
    axes.set_ylim(len(duels) - 0.6, -0.85)
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    # The outermost figures would reach beyond the chart.
    axes.xaxis.get_majorticklabels()[0].set_horizontalalignment("left")
    axes.xaxis.get_majorticklabels()[-1].set_horizontalalignment("right")
    svg = to_svg(figure, "win-rates", title="Win rates", description="; ".join(message))
    return Chart("Win rate of the first model", "95 % intervals; a tie counts half", svg)


def _shortened(title: str) -> str:
    """Both ends of a long name."""
    half = _LONGEST // 2
    return title if len(title) <= _LONGEST else f"{title[:half]}…{title[1 - half :]}"

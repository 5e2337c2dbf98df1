"""Presentation of layer curves: table in the terminal, figure, suggested layers."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.evaluate.likelihood.advise import ADVICE, advice_markdown, format_best_layers
from megatron_idpo.evaluate.likelihood.curves_file import FILE
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.models import OUTPUT, write_result
from megatron_idpo.figures.chart import save_charts, series_legend
from megatron_idpo.figures.evaluation import MAIN_QUANTITIES, layer_charts
from megatron_idpo.figures.numbers import decimal

FIGURES = ("likelihood.png", "likelihood.svg")

_SHOWN = ("likelihood", "margin", "accuracy")
"""Quantities that fit into 80 columns; the rest is in the file."""

_DEPTHS = (0.25, 0.5, 0.69, 1.0)
"""Depths that the table shows; 0.69 is layer 22 of 32, the best of the intermediate-DPO paper."""


def show_curves(curves: Sequence[LayerCurves], directory: Path) -> None:
    """Write figures and advice, and print the table, the best layers and the paths.

    Raises:
        ConfigError: a file cannot be written.
    """
    models = {model.model: model.estimates for model in curves}
    sample = curves[0].format_sample
    for name in FIGURES:
        save_charts(
            layer_charts(models, MAIN_QUANTITIES),
            directory / name,
            location=OUTPUT,
            legend=series_legend(models),
            footnote=f"{sample}; bands: 95 % intervals",
        )
    write_result(directory / ADVICE, advice_markdown(curves))
    console = Console(highlight=False)
    console.print(likelihood_table(curves))
    has_intervals = curves[0].prompts > 1
    note = "; 95% intervals over prompts" if has_intervals else ": too few for intervals"
    for line in (sample + note, *format_best_layers(curves)):
        console.print(line, soft_wrap=True, markup=False)
    for title, name in (("curves", FILE), ("figure", FIGURES[0]), ("layers", ADVICE)):
        console.print(f"{title:8} {directory / name}", soft_wrap=True, markup=False)


def likelihood_table(curves: Sequence[LayerCurves]) -> Table:
    """Some layers of every model."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("model", overflow="fold")
    for name in ("layer", *_SHOWN):
        table.add_column(name, justify="right", no_wrap=True)
    for model in curves:
        depth = len(model.layers)
        indices = sorted({max(1, round(share * depth)) - 1 for share in _DEPTHS})
        for index in indices:
            table.add_row(
                Text(model.model if index == indices[0] else ""),
                f"{index + 1}/{depth}",
                *(_format(model, name, index) for name in _SHOWN),
            )
    return table


def _format(model: LayerCurves, name: str, index: int) -> Text:
    """`0.631 [0.602, 0.660]`; without the interval where it is not known."""
    estimate = [float(array_L[index]) for array_L in model.estimates[name]]
    value, low, high = (f"{x:+.2f}" if name == "margin" else decimal(x) for x in estimate)
    return Text(value if isnan(estimate[1]) else f"{value} [{low}, {high}]")

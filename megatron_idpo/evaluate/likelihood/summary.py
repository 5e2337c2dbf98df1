"""What is shown of layer curves: a table in the terminal, a picture, the layers to tap."""

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
from megatron_idpo.evaluate.result_files import write_text
from megatron_idpo.figures.layer_curves import PICTURES, draw_likelihood

_SHOWN = ("likelihood", "margin", "accuracy")
"""What a terminal of 80 characters has room for; the rest is in the file."""

_DEPTHS = (0.25, 0.5, 0.69, 1.0)
"""Layers that the table shows; 0.69 is the intermediate-DPO paper's 22 of 32."""


def tell_curves(curves: Sequence[LayerCurves], directory: Path) -> None:
    """Draw the picture, write the advice, and show both with a table and the files.

    Raises:
        ConfigError: a file cannot be written.
    """
    for name in PICTURES:
        draw_likelihood(curves, directory / name)
    write_text(directory / ADVICE, advice_markdown(curves))
    console = Console(highlight=False)
    console.print(likelihood_table(curves))
    said = curves[0].format_sample
    said += "; 95% intervals over prompts" if curves[0].prompts > 1 else ": too few for intervals"
    for line in (said, *format_best_layers(curves)):
        console.print(line, soft_wrap=True, markup=False)
    for title, name in (("curves", FILE), ("picture", PICTURES[0]), ("layers", ADVICE)):
        console.print(f"{title:8} {directory / name}", soft_wrap=True, markup=False)


def likelihood_table(curves: Sequence[LayerCurves]) -> Table:
    """Some layers of every model."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("model", overflow="fold")
    for name in ("layer", *_SHOWN):
        table.add_column(name, justify="right", no_wrap=True)
    for model in curves:
        for number, location in enumerate(_places(model.layers)):
            table.add_row(
                Text(model.model if number == 0 else ""),
                f"{model.layers[location]}/{model.layers[-1]}",
                *(_describe(model, name, location) for name in _SHOWN),
            )
    return table


def _places(layers: Sequence[int]) -> list[int]:
    return sorted({max(1, round(depth * len(layers))) - 1 for depth in _DEPTHS})


def _describe(model: LayerCurves, name: str, location: int) -> Text:
    """`0.631 [0.602, 0.660]`; the interval is left out where it is not known."""
    one = model.estimates[name]
    form = "+.2f" if name == "margin" else ".3f"
    value, low, high = (array[location] for array in (one.value_L, one.low_L, one.high_L))
    message = f"{value:{form}}"
    return Text(message if isnan(low) else f"{message} [{low:{form}}, {high:{form}}]")

"""Layer curves as a CSV file: one row per model and layer, readable by anything.

    model, layer, depth, pairs, prompts, chance_nats, likelihood, likelihood_low, ...

Bounds are of 95 % intervals; a value that is not known is empty.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves
from megatron_idpo.evaluate.result_files import write_text

DIRECTORY = "likelihood"
"""In the evaluation's output."""

FILE = "likelihood.csv"

_SAMPLE = ("model", "layer", "depth", "pairs", "prompts", "chance_nats")
_ENDINGS = ("", "_low", "_high")
COLUMNS = (*_SAMPLE, *(f"{name}{ending}" for name in QUANTITIES for ending in _ENDINGS))


def write_curves(path: Path, curves: Sequence[LayerCurves]) -> None:
    """Write the curves of all models; the file appears whole.

    Raises:
        ConfigError: it cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for model in curves:
        writer.writerows(_rows(model))
    write_text(path, table.getvalue())


def read_curves(path: Path) -> list[LayerCurves]:
    """The curves of all models, in the file's order.

    Raises:
        DataError: there is no such file, or it is none of ours.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"cannot be read: {error}"
        raise DataError.at(str(path), message, "make it by `likelihood`") from None
    models: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        models.setdefault(row.get("model") or "", []).append(row)
    try:
        found = [_curves(model, rows) for model, rows in models.items()]
    except (KeyError, ValueError, TypeError) as error:
        message = f"is no table of layer curves ({type(error).__name__}: {error})"
        raise DataError.at(str(path), message, "make it again by `likelihood`") from None
    if not found:
        raise DataError.at(str(path), "has no row", "make it again by `likelihood`")
    return found


def _rows(curves: LayerCurves) -> Iterator[list[str]]:
    depth = curves.layers[-1]
    for location, layer in enumerate(curves.layers):
        chance = f"{curves.chance_nats:.6g}"
        sample = (curves.model, layer, f"{layer / depth:.4f}", curves.pairs, curves.prompts, chance)
        estimates = [curves.estimates[name] for name in QUANTITIES]
        figures = [
            figure
            for one in estimates
            for figure in (one.value_L[location], one.low_L[location], one.high_L[location])
        ]
        yield [*map(str, sample), *("" if math.isnan(f) else f"{f:.9g}" for f in figures)]


def _curves(model: str, rows: Sequence[dict[str, str]]) -> LayerCurves:
    """Raises KeyError, ValueError or TypeError for what is no such table."""
    estimates = {
        name: Estimate(
            *(
                np.array([float(row[f"{name}{ending}"] or "nan") for row in rows])
                for ending in _ENDINGS
            )
        )
        for name in QUANTITIES
    }
    layers = tuple(int(row["layer"]) for row in rows)
    if layers != tuple(range(1, len(layers) + 1)):
        raise ValueError(f"the layers of {model} are {layers}")
    first = rows[0]
    pairs, prompts, chance_nats = first["pairs"], first["prompts"], first["chance_nats"]
    return LayerCurves(model, layers, int(pairs), int(prompts), float(chance_nats), estimates)

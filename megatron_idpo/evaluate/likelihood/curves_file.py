"""Files of layer curves: `likelihood.csv` and `settings.json`.

The CSV has one row per model and layer:

    model, layer, depth, pairs, prompts, chance_nats, likelihood, likelihood_low, ...

Bounds are of 95 % intervals; a value that is not known is empty. The settings record what the
curves were made from.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves
from megatron_idpo.evaluate.models import OUTPUT, EvalModel, write_result
from megatron_idpo.storage.provenance import read_record, write_record

DIRECTORY = "likelihood"
"""In the evaluation's output."""

FILE, SETTINGS = "likelihood.csv", "settings.json"

_SAMPLE = ("model", "layer", "depth", "pairs", "prompts", "chance_nats")
_ENDINGS = ("", "_low", "_high")
COLUMNS = (*_SAMPLE, *(f"{name}{ending}" for name in QUANTITIES for ending in _ENDINGS))
_REMEDY = "run `likelihood` again"


def write_curves(path: Path, curves: Sequence[LayerCurves]) -> None:
    """Write the curves of all models in one step.

    Raises:
        ConfigError: the file cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for model in curves:
        writer.writerows(_rows(model))
    write_result(path, table.getvalue())


def read_curves(path: Path) -> list[LayerCurves]:
    """The curves of all models, in the order of the file.

    Raises:
        DataError: there is no such file, or it is not a table of layer curves.
    """
    models: dict[str, list[dict[str, str]]] = {}
    try:
        with (
            DataError.on_os_error(str(path), "cannot be read", _REMEDY),
            path.open(newline="", encoding="utf-8") as file,
        ):
            for row in csv.DictReader(file):
                models.setdefault(row.get("model") or "", []).append(row)
        curves = [_parse(model, rows) for model, rows in models.items()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError.at(str(path), f"cannot be read: {error}", _REMEDY) from None
    except (KeyError, ValueError, TypeError) as error:
        message = f"is not a table of layer curves ({type(error).__name__}: {error})"
        raise DataError.at(str(path), message, _REMEDY) from None
    if not curves:
        raise DataError.at(str(path), "has no rows", _REMEDY)
    return curves


def _rows(curves: LayerCurves) -> Iterator[list[str]]:
    for index, layer in enumerate(curves.layers):
        depth, chance = f"{layer / curves.layers[-1]:.4f}", f"{curves.chance_nats:.6g}"
        sample = (curves.model, layer, depth, curves.pairs, curves.prompts, chance)
        values = [array_L[index] for name in QUANTITIES for array_L in curves.estimates[name]]
        yield [*map(str, sample), *("" if math.isnan(v) else f"{v:.9g}" for v in values)]


def _parse(model: str, rows: Sequence[dict[str, str]]) -> LayerCurves:
    """Raises KeyError, ValueError or TypeError if the rows are something else."""
    estimates = {
        name: Estimate(
            *(np.array([float(row[f"{name}{end}"] or "nan") for row in rows]) for end in _ENDINGS)
        )
        for name in QUANTITIES
    }
    layers = tuple(int(row["layer"]) for row in rows)
    if layers != tuple(range(1, len(layers) + 1)):
        raise ValueError(f"the layers of {model} are {layers}")
    pairs, prompts, chance_nats = (rows[0][name] for name in ("pairs", "prompts", "chance_nats"))
    return LayerCurves(model, layers, int(pairs), int(prompts), float(chance_nats), estimates)


def write_settings(
    directory: Path, config: RunConfig, models: Sequence[EvalModel], logps: Mapping[str, str]
) -> None:
    """Record what the curves in a directory were made from.

    Args:
        directory: of the curves.
        config: of the evaluation.
        models: of the curves.
        logps: model name -> its log-probabilities within the directory (`reference.parquet`, see
            docs/reference.md).

    Raises:
        DataError: the file cannot be written.
    """
    paths = {
        model.name: model.path if model.adapter is None else f"{model.path} with {model.adapter}"
        for model in models
    }
    record = {
        "reference": config.model.path,
        "models": paths,
        "beta": config.objective.beta,
        "norm": config.objective.norm,
        "dtype": config.model.dtype,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "seed": config.evaluate.seed,
        "readings": dict(logps),
    }
    write_record(directory / SETTINGS, record, error=DataError, remedy=f"change {OUTPUT}", indent=2)


def read_settings(directory: Path) -> dict[str, Any]:
    """The record of `write_settings`.

    Raises:
        DataError: it is missing or damaged.
    """
    path = directory / SETTINGS
    record = read_record(path, error=DataError, remedy=_REMEDY)
    if not isinstance(record.get("reference"), str) or not isinstance(record.get("beta"), float):
        raise DataError.at(str(path), "is not a record of layer curves", _REMEDY)
    return record

"""Curves of a run from its metrics file, as lines of the training charts and as `curves.png`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_idpo.errors import DataError
from megatron_idpo.figures import training as charts
from megatron_idpo.figures.chart import save_charts
from megatron_idpo.figures.series import Series
from megatron_idpo.figures.style import FINAL, Style, layer_styles
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics import names
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.intervals import wilson_interval

_PICTURED = (
    charts.LOSS,
    charts.MARGIN,
    charts.ACCURACY,
    charts.GRAD_NORM,
    charts.LEARNING_RATE,
    charts.TOKENS_PER_S,
)
_LAYER_METRICS = {
    charts.LOSS: names.LOSS,
    charts.MARGIN: names.MARGIN,
    charts.ACCURACY: names.ACCURACY,
}
_RUN_METRICS = {
    charts.GRAD_NORM: names.GRAD_NORM,
    charts.LEARNING_RATE: names.LEARNING_RATE,
    charts.TOKENS_PER_S: names.TOKENS_PER_S,
    charts.PEAK_GB: names.PEAK_GB,
}


LAYER_CHARTS = (charts.LOSS, charts.MARGIN, charts.ACCURACY)
"""What is known of every layer."""


def draw_curves(
    metrics_path: Path,
    target: Path,
    *,
    title: str = "",
    pictured: Sequence[str] = _PICTURED,
    columns: int = 2,
) -> None:
    """Write the training charts of a run as a PNG.

    Args:
        metrics_path: the run's metrics file.
        target: the file; its directory is created if needed.
        title: the run's name.
        pictured: the quantities.
        columns: of charts.

    Raises:
        ConfigError: the metrics cannot be read, or the PNG cannot be written.
        DataError: nothing was logged.
    """
    records = read_metrics(metrics_path)
    lines = run_lines(records, names.layers_in(name for record in records for name in record))
    drawn = charts.training_charts(lines, pictured) if records else []
    if not drawn:
        raise DataError.at(str(metrics_path), "has no metrics to draw", "train at least one step")
    save_charts(
        drawn,
        target,
        title=title,
        legend=[(line.label, line.style) for line in lines],
        footnote=charts.smoothing_note(lines),
        columns=columns,
    )


def run_lines(records: Sequence[Record], layers: Sequence[int]) -> list[charts.TrainingLine]:
    """A line for each of these intermediate layers, then the final layer's."""
    styles = layer_styles(layers)
    lines = [training_line(records, f"layer {layer}", styles[layer], layer) for layer in layers]
    return [*lines, training_line(records, "final layer", FINAL)]


def training_line(
    records: Sequence[Record], label: str, style: Style, layer: int | None = None
) -> charts.TrainingLine:
    """A layer's series; of the final layer (None) also those of the whole run."""
    metrics = dict(_LAYER_METRICS)
    if layer is None:
        metrics[charts.LOSS] = names.FINAL_LOSS
    else:
        metrics = {key: names.layer_name(layer, name) for key, name in metrics.items()}
    held_out = {key: series_of(records, f"{names.EVAL}{name}") for key, name in metrics.items()}
    if layer is None:
        held_out[charts.ACCURACY] = _with_interval(held_out[charts.ACCURACY], records)
        metrics |= _RUN_METRICS
    return charts.TrainingLine(
        label,
        style,
        is_final=layer is None,
        training={key: series_of(records, name) for key, name in metrics.items()},
        held_out=held_out,
    )


def series_of(records: Sequence[Record], name: str) -> Series:
    """The finite values of a metric over steps.

    An accuracy is left out where policy and reference are equal: all pairs are tied there, which
    would otherwise look like an accuracy of 0.
    """
    is_accuracy = name.endswith(names.ACCURACY)
    margin = f"{name.removesuffix(names.ACCURACY)}{names.MARGIN}"
    points = [
        (record[STEP], record[name])
        for record in records
        if name in record and not (is_accuracy and is_tied(record[name], record.get(margin)))
    ]
    steps_S, values_S = np.array(points, np.float64).reshape(-1, 2).T
    is_known_S = np.isfinite(values_S)
    return Series(steps_S[is_known_S], values_S[is_known_S])


def _with_interval(accuracy: Series, records: Sequence[Record]) -> Series:
    """The interval equals the value where the number of pairs is not known."""
    pairs = {record[STEP]: record.get(names.EVAL_PAIRS, 0.0) for record in records}
    bounds = [
        wilson_interval(share, pairs[step]) if pairs[step] else (share, share)
        for step, share in zip(accuracy.x_S, accuracy.y_S, strict=True)
    ]
    low_S, high_S = np.array(bounds, np.float64).reshape(-1, 2).T
    return Series(accuracy.x_S, accuracy.y_S, low_S, high_S)

"""Summary of a run at its end, from its metrics file, so that it includes earlier starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.console.text import format_duration
from megatron_idpo.figures.numbers import decimal
from megatron_idpo.train.logging.line import format_metric, is_tied
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.intervals import wilson_interval
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    EVAL_PAIRS,
    FINAL_LOSS,
    LOSS,
    MARGIN,
    MFU,
    PAIRS_PER_S,
    PEAK_GB,
    ROW_FILL,
    TFLOPS,
    TOKENS_PER_S,
    layer_name,
    layers_in,
)

_SHOWN_LAYERS = 4
"""Maximum number of intermediate layers with a row each; of more the first and last have one."""


@dataclass(frozen=True, slots=True)
class MetricTrend:
    """First, last and best value of a metric."""

    first: float
    last: float
    best: float
    best_step: int

    @classmethod
    def of(cls, records: Sequence[Record], name: str, *, lowest: bool) -> "MetricTrend | None":
        """Of the finite values of this name; None if there are none."""
        points = [
            (int(record[STEP]), record[name])
            for record in records
            if math.isfinite(record.get(name, math.nan))
        ]
        if not points:
            return None
        sign = 1 if lowest else -1
        best_step, best = min(points, key=lambda point: sign * point[1])
        return cls(points[0][1], points[-1][1], best, best_step)


def show_summary(
    console: Console, metrics_path: Path, averages: Mapping[str, float], *, wall_s: float
) -> None:
    """Print a table of the metrics and a line on the pace.

    Args:
        console: to print to.
        metrics_path: the run's metrics file.
        averages: rates of this start (`Meter.averages`), and the memory peak if known.
        wall_s: seconds since this start, including everything.

    Raises:
        ConfigError: the metrics cannot be read.
    """
    records = read_metrics(metrics_path)
    if records:
        console.print(_table(records))
    console.print(Text(pace_line(averages, wall_s)), soft_wrap=True)


def pace_line(averages: Mapping[str, float], wall_s: float) -> str:
    """`in 12:31; 12.3 pairs/s, 3.1k tok/s, 97% full, 5.2 GB`."""
    names = (PAIRS_PER_S, TOKENS_PER_S, ROW_FILL, TFLOPS, MFU, PEAK_GB)
    rates = ", ".join(format_metric(name, averages[name]) for name in names if name in averages)
    return f"in {format_duration(wall_s)}" + (f"; {rates}" if rates else "")


def _table(records: Sequence[Record]) -> Table:
    """First, last and best value of each metric, of training and of held-out pairs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("first", "last", "best", "at step"):
        table.add_column(heading, justify="right")
    for title, prefix in (("training", ""), ("held-out pairs", EVAL)):
        rows = _rows(records, prefix)
        if rows:
            if table.row_count:
                table.add_section()
            table.add_row(Text(title, style="bold"))
            for row in rows:
                table.add_row(*row)
    return table


def _rows(records: Sequence[Record], prefix: str) -> list[tuple[str, ...]]:
    """A row per logged metric."""
    rows = []
    for label, name in _quantities(records):
        if name == ACCURACY:
            rows += _accuracy_rows(label, records, prefix)
            continue
        trend = MetricTrend.of(records, f"{prefix}{name}", lowest=name.endswith(LOSS))
        form = "+.3f" if name.endswith(MARGIN) else ".4f"
        if trend is not None:
            texts = [f"{value:{form}}" for value in (trend.first, trend.last, trend.best)]
            rows.append((label, *texts, f"{trend.best_step:,}"))
    return rows


def _accuracy_rows(label: str, records: Sequence[Record], prefix: str) -> list[tuple[str, ...]]:
    """The accuracy, and its 95 % interval on held-out pairs.

    The accuracy is undefined while policy and reference are equal, as in an evaluation before the
    first step; the first value is then `tied`.
    """
    names = (f"{prefix}{ACCURACY}", f"{prefix}{MARGIN}")
    measured = [record for record in records if names[0] in record]
    untied = [record for record in measured if not is_tied(*map(record.get, names))]
    trend = MetricTrend.of(untied, names[0], lowest=False)
    if trend is None:
        return []
    shares = (trend.first, trend.last, trend.best)
    starts_tied = untied[0] is not measured[0]
    first, *others = (decimal(share, ".2f") for share in shares)
    rows = [(label, "tied" if starts_tied else first, *others, f"{trend.best_step:,}")]
    pairs = next((record[EVAL_PAIRS] for record in measured if record.get(EVAL_PAIRS)), None)
    if prefix and pairs:
        bounds = [wilson_interval(share, pairs) for share in shares]
        first, *others = (f"{low:.2f}-{high:.2f}" for low, high in bounds)
        first = "" if starts_tied else first
        rows.append((f"  95% interval, {pairs:,.0f} pairs", first, *others, ""))
    return rows


def _quantities(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Labels and names of the metrics, including intermediate layers."""
    layers = layers_in(name for record in records for name in record)
    shown = layers if len(layers) <= _SHOWN_LAYERS else [layers[0], layers[-1]]
    losses = [(f"  layer {layer}", layer_name(layer, LOSS)) for layer in shown]
    margins = [(f"  layer {layer}", layer_name(layer, MARGIN)) for layer in shown]
    final = [("  final layer", FINAL_LOSS)] if layers else []
    return [
        ("loss", LOSS),
        *losses,
        *final,
        ("margin, final layer" if layers else "margin", MARGIN),
        *margins,
        ("accuracy, final layer" if layers else "accuracy", ACCURACY),
    ]

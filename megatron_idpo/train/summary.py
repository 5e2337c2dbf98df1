"""What a run came to, at its end: from its metrics file, so that earlier starts are in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.train.logging.line import clock_time, is_tied, short
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
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
"""Intermediate layers with lines of their own; of more the first and the last have one."""


@dataclass(frozen=True, slots=True)
class MetricTrend:
    """How one quantity went."""

    first: float
    last: float
    best: float
    best_step: int

    @classmethod
    def of(cls, records: Sequence[Record], name: str, *, lowest: bool) -> "MetricTrend | None":
        """The course of the finite values of this name; None if there are none."""
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
    console: Console, metrics_path: Path, achieved: Mapping[str, float], *, wall_s: float
) -> None:
    """Prints the table, and a line on how fast it went.

    Args:
        console: where to.
        metrics_path: the run's metrics file.
        achieved: averages of this start (`Meter.averages`), and the memory peak if known.
        wall_s: how long this start took, everything included.

    Raises:
        ConfigError: the metrics cannot be read.
    """
    records = read_metrics(metrics_path)
    if records:
        console.print(_table(records))
    console.print(Text(pace_line(achieved, wall_s)), soft_wrap=True)


def pace_line(achieved: Mapping[str, float], wall_s: float) -> str:
    """`in 12:31; 12.3 pairs/s, 3.1k tokens/s, rows 97% full, 5.2 GB at most`."""
    formats = (
        (PAIRS_PER_S, lambda value: f"{short(value)} pairs/s"),
        (TOKENS_PER_S, lambda value: f"{short(value)} tokens/s"),
        (ROW_FILL, lambda value: f"rows {value:.0%} full"),
        (TFLOPS, lambda value: f"{_flops(value)} per device"),
        (MFU, lambda value: f"MFU {value:.0%}"),
        (PEAK_GB, lambda value: f"{value:.1f} GB at most"),
    )
    message = [text(achieved[name]) for name, text in formats if name in achieved]
    return "; ".join([f"in {clock_time(wall_s)}", *([", ".join(message)] if message else [])])


def _flops(tera: float) -> str:
    return f"{short(tera)} TFLOP/s" if tera >= 1 else f"{short(1e3 * tera)} GFLOP/s"


def _table(records: Sequence[Record]) -> Table:
    """Training and held-out pairs: first, last and best of each quantity."""
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
    """A row for each quantity that was logged."""
    rows = []
    for label, name in _quantities(records):
        if name == ACCURACY:
            rows += _accuracy_rows(label, records, prefix)
            continue
        course = MetricTrend.of(records, f"{prefix}{name}", lowest=name.endswith(LOSS))
        form = "+.3f" if name.endswith(MARGIN) else ".4f"
        if course is not None:
            message = [f"{number:{form}}" for number in (course.first, course.last, course.best)]
            rows.append((label, *message, f"{course.best_step:,}"))
    return rows


def _accuracy_rows(label: str, records: Sequence[Record], prefix: str) -> list[tuple[str, ...]]:
    """The accuracy, and on held-out pairs how far it can be trusted.

    Where policy and reference were equal there is none, which a run on held-out pairs begins with.
    """
    names = (f"{prefix}{ACCURACY}", f"{prefix}{MARGIN}")
    measured = [record for record in records if names[0] in record]
    untied = [record for record in measured if not is_tied(*map(record.get, names))]
    course = MetricTrend.of(untied, names[0], lowest=False)
    if course is None:
        return []
    shares = (course.first, course.last, course.best)
    begins_tied = untied[0] is not measured[0]
    message = ["tied" if begins_tied else f"{course.first:.2f}", *(f"{s:.2f}" for s in shares[1:])]
    rows = [(label, *message, f"{course.best_step:,}")]
    pairs = next((record[EVAL_PAIRS] for record in measured if record.get(EVAL_PAIRS)), None)
    if prefix and pairs:
        bounds = [wilson_interval(share, pairs) for share in shares]
        first, *others = (f"{low:.2f}-{high:.2f}" for low, high in bounds)
        intervals = ["" if begins_tied else first, *others]
        rows.append((f"  95% interval, {pairs:,.0f} pairs", *intervals, ""))
    return rows


def _quantities(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Labels and names, with layers where there are intermediate ones."""
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

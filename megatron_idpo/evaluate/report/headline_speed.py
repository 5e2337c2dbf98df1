"""How fast a run went and how much memory it took, from what it logged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_idpo.evaluate.report.format import NOTHING, decimal, duration, percent, rate
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.names import (
    MFU,
    PAIRS_PER_S,
    PEAK_GB,
    ROW_FILL,
    STEP_S,
    TFLOPS,
    TOKENS_PER_S,
)

_WARMUP_STEPS = 2
"""The first steps compile and allocate: they are no part of rates."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line: what it is about, the figure, and what belongs to it in small print."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast training went, over all of its steps but the first ones."""

    seconds: float
    """Of all steps; NaN where it is not known."""

    means: Mapping[str, float]
    """By the names of metrics."""

    peak_gb: float


def speed_figures(records: Sequence[Record]) -> Speed:
    """Rates from what was logged, each line weighed by the time it covers."""
    before, total, stretches = 0.0, 0.0, []
    for record in records:
        seconds = record.get(STEP_S, math.nan)
        if math.isfinite(seconds):
            took = seconds * (record[STEP] - before)
            total += took
            stretches.append((record, took))
            before = record[STEP]
    rated = [one for one in stretches if one[0][STEP] > _WARMUP_STEPS] or stretches
    means = {}
    for name in (STEP_S, TOKENS_PER_S, PAIRS_PER_S, ROW_FILL, TFLOPS, MFU):
        known = [(r[name], took) for r, took in rated if math.isfinite(r.get(name, math.nan))]
        weight = math.fsum(took for _, took in known)
        if weight:
            means[name] = math.fsum(value * took for value, took in known) / weight
    peaks = [record[PEAK_GB] for record in records if math.isfinite(record.get(PEAK_GB, math.nan))]
    return Speed(total if stretches else math.nan, means, max(peaks, default=math.nan))


def speed_facts(records: Sequence[Record]) -> list[Fact]:
    """Everything that is known of throughput and memory."""
    speed = speed_figures(records)
    mean = speed.means
    message = [
        ("Time of all steps", duration(speed.seconds)),
        ("A step", duration(mean.get(STEP_S, math.nan))),
        ("Tokens per second", rate(mean.get(TOKENS_PER_S, math.nan))),
        ("Pairs per second", rate(mean.get(PAIRS_PER_S, math.nan))),
        ("Rows filled", percent(mean.get(ROW_FILL, math.nan), 1)),
        ("Operations per device", _format_flops(mean.get(TFLOPS, math.nan))),
        ("Model FLOP utilisation", percent(mean.get(MFU, math.nan), 1)),
        ("Peak memory", format_memory(speed.peak_gb)),
    ]
    return [Fact(name, value) for name, value in message if value != NOTHING]


def _format_flops(tera: float) -> str:
    if not math.isfinite(tera):
        return NOTHING
    return f"{rate(tera)} TFLOP/s" if tera >= 1 else f"{rate(1000 * tera)} GFLOP/s"


def format_memory(peak_gb: float) -> str:
    """`3.3 GB`"""
    return f"{decimal(peak_gb, '.1f')} GB" if math.isfinite(peak_gb) else NOTHING

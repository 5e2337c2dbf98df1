"""The summary at the end of a run, as text."""

import io
import json
import math
import re
from pathlib import Path

from rich.console import Console

from megatron_idpo.train.summary import MetricTrend, pace_line, show_summary

AVERAGES = {
    "throughput/pairs_per_s": 12.31,
    "throughput/tokens_per_s": 3123.0,
    "throughput/row_fill": 0.97,
    "throughput/tflops_per_device": 0.0512,
    "memory/peak_gb": 5.21,
}


def summary(tmp_path: Path, records: list[dict[str, float]]) -> list[str]:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    written = io.StringIO()
    show_summary(Console(file=written, width=80, highlight=False), path, AVERAGES, wall_s=751.0)
    return [line.rstrip() for line in written.getvalue().splitlines() if line.strip(" ─")]


def step(number: int, loss: float, margin: float, accuracy: float, prefix: str = "") -> dict:
    return {
        "step": number,
        f"{prefix}loss": loss,
        f"{prefix}rewards/margins": margin,
        f"{prefix}rewards/accuracies": accuracy,
    }


def test_plain_dpo(tmp_path):
    held_out = {"eval_pairs": 40}
    records = [
        step(0, 0.6931, 0.0, 0.0, "eval_") | held_out,
        step(1, 0.6931, 0.0, 0.0),
        step(10, 0.4, 0.9, 0.75),
        step(20, 0.5, 0.8, 0.875),
        step(20, 0.45, 0.7, 0.8, "eval_") | held_out,
    ]
    assert summary(tmp_path, records) == [
        "                             first        last        best   at step",
        " training",
        " loss                       0.6931      0.5000      0.4000        10",
        " margin                     +0.000      +0.800      +0.900        10",
        " accuracy                     tied        0.88        0.88        20",
        " held-out pairs",
        " loss                       0.6931      0.4500      0.4500        20",
        " margin                     +0.000      +0.700      +0.700        20",
        " accuracy                     tied        0.80        0.80        20",
        "   95% interval, 40 pairs            0.65-0.90   0.65-0.90",
        "in 12:31; 12.3 pairs/s, 3.1k tok/s, 97% full, 51.2 GFLOP/s per device, 5.2 GB",
    ]


def test_intermediate_layers_have_rows(tmp_path):
    layered = {"final_loss": 0.5, "layer_22/loss": 0.6, "layer_22/rewards/margins": 0.2}
    lines = summary(tmp_path, [step(1, 0.51, 0.3, 0.5) | layered])
    assert [re.split(r"\s{2,}", line.strip())[0] for line in lines[2:8]] == [
        "loss",
        "layer 22",
        "final layer",
        "margin, final layer",
        "layer 22",
        "accuracy, final layer",
    ]
    many = {f"layer_{layer}/loss": 0.6 for layer in range(2, 24, 2)}
    text = "\n".join(summary(tmp_path, [step(1, 0.51, 0.3, 0.5) | many]))
    assert "layer 2 " in text and "layer 22 " in text and "layer 4 " not in text


def test_without_metrics_only_the_pace_is_printed(tmp_path):
    assert len(summary(tmp_path, [])) == 1


def test_trend_skips_values_that_are_not_finite():
    values = [math.nan, 3.0, 1.0, 2.0, math.nan]
    records = [{"step": float(number), "x": value} for number, value in enumerate(values)]
    assert MetricTrend.of(records, "x", lowest=True) == MetricTrend(3.0, 2.0, 1.0, 2)
    assert MetricTrend.of(records, "x", lowest=False) == MetricTrend(3.0, 2.0, 3.0, 1)
    assert MetricTrend.of(records, "y", lowest=True) is None


def test_pace():
    assert pace_line({}, 5.0) == "in 0:05"
    assert pace_line({"throughput/tflops_per_device": 412.3, "throughput/mfu": 0.417}, 5.0) == (
        "in 0:05; 412 TFLOP/s per device, MFU 42%"
    )

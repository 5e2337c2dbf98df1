"""The meter: rates of an interval and of the run, with a fake clock."""

import psutil
import pytest
import torch

from megatron_idpo.train.metrics.flops import BatchWork, ModelFlops
from megatron_idpo.train.metrics.names import (
    MFU,
    PAIRS_PER_S,
    ROW_FILL,
    STEP_S,
    TFLOPS,
    TOKENS_PER_S,
)
from megatron_idpo.train.metrics.throughput import Meter, peak_memory_bytes

from .test_flops import ARCHITECTURE

WORK = BatchWork(pairs=8, used_tokens=900, computed_tokens=1000, response_tokens=300, attended=1e4)
FLOPS = ModelFlops(architecture=ARCHITECTURE, num_heads=2, adapter_weights=10)


class Clock:
    """Seconds that the test advances."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(meter: Meter, clock: Clock, *seconds: float) -> None:
    for step_s in seconds:
        meter.begin()
        clock.now += step_s
        meter.end(WORK)
        clock.now += 1000.0  # an evaluation or a checkpoint


def make(device_peak: float | None = None, warmup_steps: int = 2) -> tuple[Meter, Clock]:
    clock = Clock()
    meter = Meter(
        flops=FLOPS, num_devices=4, device_peak=device_peak, warmup_steps=warmup_steps, clock=clock
    )
    return meter, clock


def test_interval_excludes_time_between_steps():
    meter, clock = make(device_peak=1e6)
    run(meter, clock, 3.0, 1.0)
    flops = 2 * FLOPS.step(WORK) / 4.0 / 4
    assert meter.take() == pytest.approx(
        {
            STEP_S: 2.0,
            TOKENS_PER_S: 450.0,
            PAIRS_PER_S: 4.0,
            ROW_FILL: 0.9,
            TFLOPS: flops / 1e12,
            MFU: flops / 1e6,
        }
    )
    assert meter.take() == {}
    run(meter, clock, 0.5)
    assert meter.take()[STEP_S] == 0.5


def test_averages_exclude_the_warmup():
    meter, clock = make()
    run(meter, clock, 30.0, 10.0)
    assert meter.averages()[STEP_S] == 20.0  # there are no other steps yet
    run(meter, clock, 2.0, 1.0)
    meter.take()
    assert meter.averages()[STEP_S] == 1.5
    assert MFU not in meter.averages()


def test_meter_without_steps_reports_nothing():
    meter, _ = make()
    assert meter.take() == meter.averages() == {}


def test_cpu_memory_is_the_process_peak_in_bytes(monkeypatch):
    """At least the current resident size and at most all memory, so that a wrong unit fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resident = psutil.Process().memory_info().rss
    assert 0.99 * resident <= peak_memory_bytes() <= psutil.virtual_memory().total


def test_gpu_memory_is_that_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert peak_memory_bytes() == 123

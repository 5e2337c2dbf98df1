"""Throughput, device utilization and peak memory of a run.

Only steps are timed, from `begin` to `end`: evaluations and checkpoints between them do not count.
The first steps compile, allocate and warm caches; they are left out of the run's averages.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Total:
    """Sums over some steps."""

    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    work: BatchWork = field(default_factory=BatchWork)

    def add(self, seconds: float, flops: float, work: BatchWork) -> None:
        self.steps += 1
        self.seconds += seconds
        self.flops += flops
        self.work += work


@dataclass(slots=True, kw_only=True)
class Meter:
    """Times steps and reports rates, per logging interval and over the whole run."""

    flops: ModelFlops
    num_devices: int
    """Ranks of the run, one device each."""

    device_peak: float | None
    """FLOP/s of one device; None reports no MFU."""

    warmup_steps: int = 2
    """First steps that are left out of the averages."""

    clock: Callable[[], float] = time.perf_counter
    _start_s: float | None = None
    _interval: _Total = field(default_factory=_Total)
    _warmup: _Total = field(default_factory=_Total)
    _run: _Total = field(default_factory=_Total)
    """Steps after the warm-up."""

    def begin(self) -> None:
        """Start timing a step, before its batch is fetched: waiting for data counts."""
        self._start_s = self.clock()

    def end(self, work: BatchWork) -> None:
        """Stop the clock of a step, after its metrics are known (which synchronizes the GPU).

        Args:
            work: of all data-parallel ranks.
        """
        assert self._start_s is not None, "end without begin"
        seconds, self._start_s = self.clock() - self._start_s, None
        average = self._warmup if self._warmup.steps < self.warmup_steps else self._run
        for total in (self._interval, average):
            total.add(seconds, self.flops.step(work), work)

    def take(self) -> dict[str, float]:
        """Rates since the last call, under the names of `metrics.names`."""
        interval, self._interval = self._interval, _Total()
        return self._rates(interval)

    def averages(self) -> dict[str, float]:
        """Rates over all steps after the warm-up; over the warm-up if there are no others."""
        return self._rates(self._run if self._run.steps else self._warmup)

    def _rates(self, total: _Total) -> dict[str, float]:
        """Rates of these steps; empty if there are none."""
        if not total.steps or total.seconds <= 0:
            return {}
        work, per_device = total.work, total.flops / total.seconds / self.num_devices
        rates = {
            STEP_S: total.seconds / total.steps,
            TOKENS_PER_S: work.used_tokens / total.seconds,
            PAIRS_PER_S: work.pairs / total.seconds,
            ROW_FILL: work.used_tokens / work.computed_tokens,
            TFLOPS: per_device / 1e12,
        }
        if self.device_peak is not None:
            rates[MFU] = per_device / self.device_peak
        return rates


def peak_memory_bytes() -> int:
    """Peak memory so far: allocated by tensors on this GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB.

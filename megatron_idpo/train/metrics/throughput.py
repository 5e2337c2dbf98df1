"""How fast a run goes, how well it uses its devices, and how much memory it took.

Times are of steps alone, as whoever drives the meter marks them: evaluation and checkpoints in
between are not in them. The first steps compile, allocate and warm caches, and are left out of the
run's averages.
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

WARMUP_STEPS = 2


@dataclass(slots=True)
class _Stretch:
    """Some steps together."""

    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    work: BatchWork = field(default_factory=BatchWork)

    def add(self, seconds: float, flops: float, work: BatchWork) -> None:
        self.steps += 1
        self.seconds += seconds
        self.flops += flops
        self.work += work


class Meter:
    """Times steps and says what was achieved, since last asked and over the whole run."""

    def __init__(
        self,
        flops: ModelFlops,
        *,
        num_devices: int,
        device_peak: float | None,
        warmup_steps: int = WARMUP_STEPS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A meter that has seen no step.

        Args:
            flops: what work costs.
            num_devices: ranks of the run, each on a device of its own.
            device_peak: the most one device can do, operations per second; None: no MFU.
            warmup_steps: how many of the first steps are left out of the averages.
            clock: seconds.
        """
        self._flops = flops
        self._num_devices = num_devices
        self._device_peak = device_peak
        self._warmup_steps = warmup_steps
        self._clock = clock
        self._began_s: float | None = None
        self._steps = 0
        self._interval = _Stretch()
        self._run = _Stretch()
        self._warmup = _Stretch()

    def begin(self) -> None:
        """A step begins: before its batch is asked for, so that waiting for data counts."""
        self._began_s = self._clock()

    def end(self, work: BatchWork) -> None:
        """The step has ended, its metrics are known, so its work is done on a GPU too.

        Args:
            work: of all data-parallel ranks.
        """
        assert self._began_s is not None, "end of a step that did not begin"
        seconds, self._began_s = self._clock() - self._began_s, None
        self._steps += 1
        average = self._run if self._steps > self._warmup_steps else self._warmup
        for stretch in (self._interval, average):
            stretch.add(seconds, self._flops.step(work), work)

    def take(self) -> dict[str, float]:
        """What was achieved since the last call, under the names of `metric_names`."""
        interval, self._interval = self._interval, _Stretch()
        return self._achieved(interval)

    def averages(self) -> dict[str, float]:
        """The same over all steps but the first ones; over those where there are no others."""
        return self._achieved(self._run if self._run.steps else self._warmup)

    def _achieved(self, stretch: _Stretch) -> dict[str, float]:
        """Rates of a stretch; nothing of an empty one."""
        if not stretch.steps or stretch.seconds <= 0:
            return {}
        work, per_device = stretch.work, stretch.flops / stretch.seconds / self._num_devices
        achieved = {
            STEP_S: stretch.seconds / stretch.steps,
            TOKENS_PER_S: work.used_tokens / stretch.seconds,
            PAIRS_PER_S: work.pairs / stretch.seconds,
            ROW_FILL: work.used_tokens / work.computed_tokens,
            TFLOPS: per_device / 1e12,
        }
        if self._device_peak is not None:
            achieved[MFU] = per_device / self._device_peak
        return achieved


def peak_memory_bytes() -> int:
    """The most memory so far: of tensors on this process' GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB.

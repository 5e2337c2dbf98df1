"""What a run records about itself on request: traces of steps, and the GPU allocator's history."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.train.callbacks import Callback

logger = logging.getLogger(__name__)

PROFILE_DIRECTORY = "profile"
MEMORY_DIRECTORY = "memory"

_MAX_EVENTS = 100_000
"""Of the allocator: a few steps of a model of 8 B parameters, about 50 MB."""


class StepProfiler(Callback):
    """Traces the steps `first` to `last` with torch's profiler; one file per process.

    Only the first data-parallel replica traces: others run the same kernels.
    """

    def __init__(self, first: int, last: int, directory: Path, *, is_traced: bool) -> None:
        """Trace nothing yet.

        Args:
            first: step, from 1.
            last: step, not below `first`.
            directory: of the files; it is created when one is written.
            is_traced: whether this process writes one. The callback is on all of them, because
                the callbacks of a run are.
        """
        self._first, self._last, self._directory = first, last, directory
        self._is_traced = is_traced
        self._profile: Any = None

    def on_start(self, output: Path, *, step: int, total_steps: int) -> None:
        """Begin, if the first step to trace is the next one."""
        del output
        if self._first > total_steps:
            message = f"is [{self._first}, {self._last}], and the run has {total_steps} steps"
            raise ConfigError.at("training.profile", message, "trace an earlier step")
        self._begin_after(step)

    def on_step(self, step: int, values: object) -> None:
        """End after the last step to trace; begin before the first."""
        del values
        if self._profile is not None and step == self._last:
            self.close()
        self._begin_after(step)

    def _begin_after(self, step: int) -> None:
        if step + 1 != self._first or not self._is_traced:
            return
        cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, *cuda]
        )
        self._profile.start()

    def close(self) -> None:
        """Write the trace, also of a run that ended before `last`."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._directory / f"rank{dist.get_rank()}.trace.json.gz"
        with ConfigError.on_os_error("training.output", f"cannot write {path}", "free its disk"):
            self._directory.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        logger.info("trace of the steps from %d: %s", self._first, path)


@contextmanager
def record(training: TrainingConfig, output: Path) -> Iterator[list[Callback]]:
    """The recorders that are configured, as callbacks; files are written at the end of the block.

    Args:
        training: `profile`, `memory_snapshot` and `deterministic`.
        output: the run's directory.
    """
    callbacks: list[Callback] = []
    with ExitStack() as stack:
        if training.memory_snapshot:
            stack.enter_context(_memory_history(output / MEMORY_DIRECTORY))
        if training.deterministic:
            stack.enter_context(_deterministic_kernels())
        if training.profile is not None:
            is_traced = rank_coordinates().data_rank == 0
            directory = output / PROFILE_DIRECTORY
            profiler = StepProfiler(*training.profile, directory, is_traced=is_traced)
            stack.callback(profiler.close)
            callbacks.append(profiler)
        yield callbacks


def recording_problems(training: TrainingConfig) -> list[Problem]:
    """What cannot be recorded on this machine."""
    if training.memory_snapshot and not torch.cuda.is_available():
        message = "records the memory of a GPU, and there is none"
        return [Problem("training.memory_snapshot", message, "leave it out")]
    return []


@contextmanager
def _memory_history(directory: Path) -> Iterator[None]:
    """Record the allocator's events; write them at the end, also if memory ran out."""
    torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS)
    try:
        yield
    finally:
        path = directory / f"rank{dist.get_rank()}.pickle"
        directory.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("memory of the GPU: %s, for https://pytorch.org/memory_viz", path)


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Let torch refuse kernels whose result depends on timing."""
    before = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic  # a module with a property, which has no type
    fills = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It fills every new tensor with NaN, to find reads of memory that was never written.
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = fills

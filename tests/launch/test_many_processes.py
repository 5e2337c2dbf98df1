"""Eight processes of one machine (`--processes 8`), of which one fails: when and how all end.

Every run is started again afterwards by the same command and must end as if nothing had happened.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.train.tiny_run import Files, write_config

from .commands import ROOT
from .two_node_runs import HEARTBEAT_TIMEOUT_S, assert_same_weights, steps_logged, wait_for_steps
from .two_nodes import wait_until

pytestmark = [
    pytest.mark.distributed,
    # Eight processes import torch, twice for each fault.
    pytest.mark.exhaustive,
]

PROCESSES = 8
LAYOUT = {"tensor": 2, "pipeline": 2}
EPOCHS = 12
STEPS = 4 * EPOCHS
LOST = 3
"""The rank that fails: the first pipeline stage, the second rank of its tensor-parallel group."""

SURVIVORS = sorted(set(range(PROCESSES)) - {LOST})
END_S = 60.0
"""From the fault until no process is left."""

START_S = 400.0
"""Until a run has ended, on a busy machine."""

FULL_BYTES = 50_000
"""Files of a process may not become larger: less than it writes to a checkpoint, more than the
log has."""


class Launched:
    """A run that `--processes` has started."""

    def __init__(self, file: str, log: Path) -> None:
        words = [sys.executable, "-m", "megatron_idpo", "train", file]
        with log.open("wb") as output:
            self.launcher = subprocess.Popen(
                [*words, "--processes", str(PROCESSES)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        self._log = log
        self.processes: list[psutil.Process] = []
        """All that the run has started, when last asked."""

    def report(self) -> str:
        """What the run has printed."""
        return self._log.read_text(errors="replace")

    def find_processes(self) -> None:
        """Update `processes`."""
        with suppress(psutil.NoSuchProcess):
            self.processes = psutil.Process(self.launcher.pid).children(recursive=True)

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        children = psutil.Process(self.launcher.pid).children()
        (worker,) = (one for one in children if one.environ().get("RANK") == str(rank))
        return worker

    def left(self) -> list[psutil.Process]:
        """Processes that have not ended."""
        return [one for one in self.processes if one.is_running()]


@contextmanager
def launched(file: str, log: Path) -> Iterator[Launched]:
    """Start a run; no process outlives the block."""
    run = Launched(file, log)
    try:
        yield run
    finally:
        if run.launcher.poll() is None:
            run.find_processes()
            run.launcher.kill()
            run.launcher.wait()
        for process in run.left():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def config(files: Files, output: Path) -> str:
    return write_config(
        files,
        output,
        layout=LAYOUT,
        training={"epochs": EPOCHS, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S},
        checkpoint={"every_steps": 4, "keep_last": 1000},
    )


def finish(file: str, log: Path) -> str:
    """Run to the end; what was printed."""
    with launched(file, log) as run:
        assert run.launcher.wait(START_S) == 0, run.report()
        return run.report()


def newest_checkpoint(output: Path) -> int:
    """Its step."""
    saved = (output / "checkpoints").glob("step-*")
    return max(int(path.name.removeprefix("step-")) for path in saved)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(config(files, output), output.with_suffix(".log"))
    return output


@dataclass(frozen=True)
class Fault:
    """What happens to a run of eight processes."""

    inject: Callable[[Launched], object]
    code: int
    """Exit code of the launcher."""

    message: str
    reporters: list[int] | None = None
    """Ranks of which each prints the message; None: at least one prints it."""

    end_s: float = END_S


def limit_files(run: Launched) -> None:
    pid = run.worker(LOST).pid
    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, hard))


IS_LOST = rf"rank {LOST} \(host \S+, pipeline stage 1 of 2\) is lost: "
FAULTS = {
    "killed": Fault(
        lambda run: run.worker(LOST).send_signal(signal.SIGKILL),
        128 + signal.SIGKILL,
        f"{IS_LOST}its process has ended",
    ),
    "stopped": Fault(
        lambda run: run.worker(LOST).send_signal(signal.SIGSTOP),
        EXIT_PEER_LOST,
        rf"{IS_LOST}no heartbeat for {HEARTBEAT_TIMEOUT_S // 10}\d s",
        SURVIVORS,
        HEARTBEAT_TIMEOUT_S + 20.0,  # END_S with the default heartbeats
    ),
    "files limited": Fault(
        limit_files, EXIT_USER_ERROR, "File too large; raise the limit of file sizes"
    ),
    "preempted": Fault(
        lambda run: run.worker(LOST).send_signal(signal.SIGTERM),
        EXIT_PREEMPTED,
        "stopped by a signal",
    ),
    "launcher preempted": Fault(
        lambda run: run.launcher.send_signal(signal.SIGTERM), EXIT_PREEMPTED, "stopped by a signal"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_all_processes_and_loses_nothing(name, files, undisturbed, tmp_path):
    fault, output = FAULTS[name], tmp_path / "run"
    file = config(files, output)
    with launched(file, tmp_path / "first.log") as run:
        wait_for_steps(output, 10, [run.launcher], tmp_path / "first.log")
        run.find_processes()
        assert len(run.processes) >= PROCESSES
        start_s = time.monotonic()
        fault.inject(run)
        code = run.launcher.wait(START_S)
        wait_until(lambda: run.left() == [], END_S)
        time_s = time.monotonic() - start_s
        report = run.report()
    print(f"{name}: {time_s:.1f} s, exit code {code}")
    assert code == fault.code, report
    assert time_s < fault.end_s, report
    assert re.search(fault.message, report), report
    if fault.reporters is not None:
        reporters = re.findall(rf"error \(rank (\d)\): {fault.message}", report)
        assert sorted(int(rank) for rank in reporters) == fault.reporters, report
    assert "Traceback" not in report
    steps, saved = steps_logged(output), newest_checkpoint(output)
    assert steps < STEPS, "the fault came after the last step"
    assert saved == steps or fault.code != EXIT_PREEMPTED
    resumed = re.findall(r"resuming from step (\d+)", finish(file, tmp_path / "second.log"))
    assert resumed == [str(saved)]
    assert_same_weights(output, undisturbed)

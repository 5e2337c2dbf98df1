"""Two machines train together, and one of them fails: who ends, when, with which message and code.

Every run is started again afterwards and must end as if nothing had happened. The machines are
network namespaces, whose commands are those of `launch/slurm.sh`.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.train.tiny_run import run

from .two_node_runs import (
    HEARTBEAT_TIMEOUT_S,
    START_S,
    STEPS,
    assert_same_weights,
    config,
    start,
    steps_logged,
    wait_for_steps,
)
from .two_nodes import Node, two_nodes, wait_until, why_not

pytestmark = [
    pytest.mark.distributed,
    # Two machines import torch twice each; the normal run has
    # `test_a_stopped_process_ends_the_others_with_the_exit_code`.
    pytest.mark.exhaustive,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

END_S = 60.0
"""From the fault until both have ended, of which `launch/node.py` takes 20 s on a busy machine."""

FAKE_TIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass(frozen=True)
class Fault:
    """What happens to the machines."""

    inject: Callable[[Node, Node], object]
    codes: tuple[int | None, int | None]
    """Exit codes of both machines; None: it does not end by itself."""

    message: str
    """Printed by the machine `reporter`."""

    reporter: int = 0


IS_LOST = r"rank {} \(host node-{}, pipeline stage 1 of 1\) is lost: "
NO_HEARTBEAT = rf"{IS_LOST}no heartbeat for {HEARTBEAT_TIMEOUT_S // 10}\d s"
HAS_ENDED = f"{IS_LOST}its process has ended"
FAULTS = {
    "machine killed": Fault(
        lambda a, b: b.signal(signal.SIGKILL),
        (EXIT_PEER_LOST, -signal.SIGKILL),
        HAS_ENDED.format(1, "b"),
    ),
    "first machine killed": Fault(
        lambda a, b: a.signal(signal.SIGKILL),
        (-signal.SIGKILL, EXIT_PEER_LOST),
        HAS_ENDED.format(0, "a"),
        reporter=1,
    ),
    "process killed": Fault(
        lambda a, b: b.signal(signal.SIGKILL, b.workers()),
        (EXIT_PEER_LOST, 128 + signal.SIGKILL),
        HAS_ENDED.format(1, "b"),
    ),
    "cable cut": Fault(
        lambda a, b: b.cable("down"), (EXIT_PEER_LOST, EXIT_PEER_LOST), NO_HEARTBEAT.format(1, "b")
    ),
    "process stopped": Fault(
        lambda a, b: b.signal(signal.SIGSTOP, b.workers()),
        (EXIT_PEER_LOST, None),
        NO_HEARTBEAT.format(1, "b"),
    ),
    "machine stopped": Fault(
        lambda a, b: b.signal(signal.SIGSTOP), (EXIT_PEER_LOST, None), NO_HEARTBEAT.format(1, "b")
    ),
    "first machine stopped": Fault(
        lambda a, b: a.signal(signal.SIGSTOP),
        (None, EXIT_PEER_LOST),
        NO_HEARTBEAT.format(0, "a"),
        reporter=1,
    ),
    "preempted": Fault(
        lambda a, b: b.signal(signal.SIGTERM, b.launcher()),
        (EXIT_PREEMPTED, EXIT_PREEMPTED),
        "stopped by a signal",
    ),
    "both preempted": Fault(
        lambda a, b: [node.signal(signal.SIGTERM, node.launcher()) for node in (a, b)],
        (EXIT_PREEMPTED, EXIT_PREEMPTED),
        "stopped by a signal",
    ),
}


def wait_for_ends(started: Sequence[subprocess.Popen[bytes]], start_s: float) -> list[float]:
    """Wait until machines have ended; returns the seconds from `start_s` to the end of each."""
    ends_s: dict[int, float] = {}

    def have_ended() -> bool:
        for index, machine in enumerate(started):
            if machine.poll() is not None:
                ends_s.setdefault(index, round(time.monotonic() - start_s, 1))
        return len(ends_s) == len(started)

    wait_until(have_ended, START_S)
    return [ends_s[index] for index in range(len(started))]


def read(logs: Sequence[Path]) -> str:
    return "".join(log.read_text() for log in logs)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_both_machines_and_loses_nothing(name, files, workers, undisturbed, tmp_path):
    fault, output = FAULTS[name], tmp_path / "run"
    file = config(files, output)
    with two_nodes() as nodes:
        logs = [tmp_path / f"{node.name}.log" for node in nodes]
        started = start(nodes, tmp_path, file)
        wait_for_steps(output, 15, started, logs[0])
        start_s = time.monotonic()
        fault.inject(*nodes)
        ending = [machine for machine, code in zip(started, fault.codes, strict=True) if code]
        times_s = wait_for_ends(ending, start_s)
        print(f"{name}: {times_s}, exit codes {[machine.poll() for machine in started]}")
        assert [machine.poll() for machine in started] == list(fault.codes), read(logs)
        assert max(times_s) < END_S
    report = logs[fault.reporter].read_text()
    assert re.search(fault.message, report), report
    assert "Traceback" not in report
    assert steps_logged(output) < STEPS, "the fault came after the last step"
    workers.run(run, 2, file, timeout_s=START_S)
    assert_same_weights(output, undisturbed)


def test_a_machine_may_join_late(files, undisturbed, tmp_path):
    output = tmp_path / "run"
    with two_nodes() as nodes:
        started = start(nodes[:1], tmp_path, config(files, output))
        time.sleep(HEARTBEAT_TIMEOUT_S + 5)
        started += start(nodes[1:], tmp_path, config(files, output))
        assert [machine.wait(START_S) for machine in started] == [0, 0]
    assert_same_weights(output, undisturbed)


@pytest.mark.parametrize("ahead", [1])
def test_clocks_that_differ_change_nothing(ahead, files, undisturbed, tmp_path):
    if not FAKE_TIME.exists():
        pytest.skip("needs Debian's libfaketime")
    output, date = tmp_path / "run", tmp_path / "date"
    before = [":", ":"]
    before[ahead] = f"export LD_PRELOAD={FAKE_TIME} FAKETIME=+1h; date +%s > {date}"
    with two_nodes() as nodes:
        started = []
        for node, commands in zip(nodes, before, strict=True):
            started += start([node], tmp_path, config(files, output), before=commands)
        assert [machine.wait(START_S) for machine in started] == [0, 0]
    difference_s = int(date.read_text()) - date.stat().st_mtime
    assert difference_s == pytest.approx(3600.0, abs=60.0)
    assert_same_weights(output, undisturbed)


LEFT_BYTES = 100_000
"""On a full disk: for a line of metrics, not for a checkpoint."""

IS_FULL = r"(needs [\d,]+ bytes of disk, [\d,]+ are free|the disk or quota is full: .*); free some"
"""Before a save, or in a save that has begun."""


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A small file system that both machines see."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Fill a file system up to `LEFT_BYTES` with the file that is returned."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(disk).free - LEFT_BYTES) > 0:
            with suppress(OSError):  # the run has taken the space meanwhile
                file.write(bytes(min(left, 2**20)))
    return path


def test_a_full_output_disk_ends_both_and_loses_nothing(files, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    output, logs = disk / "run", [tmp_path / f"{name}.log" for name in "ab"]
    with small_disk(disk), two_nodes() as nodes:
        file = config(files, output)
        started = start(nodes, tmp_path, file)
        wait_for_steps(output, 15, started, logs[0])
        start_s = time.monotonic()
        filler = fill(disk)
        times_s = wait_for_ends(started, start_s)
        codes, reports = [machine.poll() for machine in started], read(logs)
        print(f"full output disk: {times_s}, exit codes {codes}")
        assert codes == [EXIT_USER_ERROR] * 2, reports
        assert max(times_s) < END_S
        assert re.search(IS_FULL, reports), reports
        assert "Traceback" not in reports
        assert steps_logged(output) < STEPS
        filler.unlink()
        started = start(nodes, tmp_path, file)
        assert [machine.wait(START_S) for machine in started] == [0, 0]
        assert "resuming from step" in logs[0].read_text()
        assert_same_weights(output, undisturbed)


def test_a_full_cache_of_one_machine_ends_both_with_its_message(files, undisturbed, tmp_path):
    output, cache = tmp_path / "run", tmp_path / "cache"
    cache.mkdir()
    file = config(files, output, cache=str(cache))
    full = f"mount -t tmpfs -o size=8k tmpfs {cache}"
    with two_nodes() as (first, second):
        started = start([first], tmp_path, file)
        started += start([second], tmp_path, file, before=full)
        assert [machine.wait(START_S) for machine in started] == [EXIT_USER_ERROR] * 2
        reports = read([tmp_path / f"{name}.log" for name in "ab"])
        assert "error (rank 1): data.cache: " in reports or "failed on rank 1: data" in reports
        assert "No space left on device; free some space" in reports
        assert "Traceback" not in reports
        started = start((first, second), tmp_path, file)
        assert [machine.wait(START_S) for machine in started] == [0, 0]
    assert_same_weights(output, undisturbed)

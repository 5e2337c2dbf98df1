"""Two machines train together, and one of them fails: who ends, when, with which message and code.

Every run is started again afterwards and must end as if nothing had happened. The machines are
network namespaces, whose commands are those of `launch/slurm.sh`.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED
from tests.train.tiny_run import (
    Files,
    exported,
    relative_difference,
    run,
    write_config,
    write_files,
)

from .two_nodes import Node, elastic_command, static_command, two_nodes, wait_until, why_not

pytestmark = [
    pytest.mark.distributed,
    # Two machines import torch twice each; the normal run has
    # `test_a_stopped_process_ends_the_others_with_the_exit_code`.
    pytest.mark.exhaustive,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

EPOCHS = 20
HEARTBEAT_TIMEOUT_S = 10
END_S = 30.0
"""Silence, the next heartbeat, the time to end, and that of `launch/node.py`, on a busy machine."""

START_S = 240.0
TOLERANCE = 1e-5
"""Between one and two data-parallel ranks, as in `tests/train/test_loop.py`."""


@dataclass(frozen=True)
class Fault:
    """What happens to the second machine."""

    inject: Callable[[Node], None]
    codes: tuple[int, int | None]
    """Exit codes of both machines; None: it does not end by itself."""

    message: str
    """Printed by the first machine."""


NO_HEARTBEAT = r"rank 1 \(host node-b, pipeline stage 1 of 1\) is lost: no heartbeat for 1\d s"
FAULTS = {
    "machine killed": Fault(
        lambda node: node.signal(signal.SIGKILL),
        (EXIT_PEER_LOST, -signal.SIGKILL),
        r"rank 1 \(host node-b, pipeline stage 1 of 1\) is lost: its process has ended",
    ),
    "process killed": Fault(
        lambda node: node.signal(signal.SIGKILL, node.workers()),
        (EXIT_PEER_LOST, 128 + signal.SIGKILL),
        r"rank 1 \(host node-b, pipeline stage 1 of 1\) is lost: its process has ended",
    ),
    "cable cut": Fault(
        lambda node: node.cable("down"), (EXIT_PEER_LOST, EXIT_PEER_LOST), NO_HEARTBEAT
    ),
    "process stopped": Fault(
        lambda node: node.signal(signal.SIGSTOP, node.workers()),
        (EXIT_PEER_LOST, None),
        NO_HEARTBEAT,
    ),
    "machine stopped": Fault(
        lambda node: node.signal(signal.SIGSTOP), (EXIT_PEER_LOST, None), NO_HEARTBEAT
    ),
    "preempted": Fault(
        lambda node: node.signal(signal.SIGTERM, node.launcher()),
        (EXIT_PREEMPTED, EXIT_PREEMPTED),
        "stopped by a signal",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(files, workers, tmp_path_factory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    workers.run(run, 2, config(files, output), timeout_s=START_S)
    return output


def config(files: Files, output: Path) -> str:
    return write_config(
        files,
        output,
        training={"epochs": EPOCHS, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S},
        checkpoint={"every_steps": 10, "keep_last": 1000},
    )


def steps_logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_both_machines_and_loses_nothing(name, files, workers, undisturbed, tmp_path):
    fault, output = FAULTS[name], tmp_path / "run"
    file = config(files, output)
    with two_nodes() as nodes:
        logs = [tmp_path / f"{node.name}.log" for node in nodes]
        started = [
            node.start(static_command(node, 1, file), log)
            for node, log in zip(nodes, logs, strict=True)
        ]
        wait_until(lambda: steps_logged(output) >= 15 or has_ended(started), START_S)
        assert not has_ended(started), logs[0].read_text()
        start_s = time.monotonic()
        fault.inject(nodes[1])
        for machine, code in zip(started, fault.codes, strict=True):
            if code is not None:
                assert machine.wait(START_S) == code, logs[0].read_text()
        print(f"{name}: {time.monotonic() - start_s:.1f} s")
        assert time.monotonic() - start_s < END_S
    assert re.search(fault.message, logs[0].read_text()), logs[0].read_text()
    assert "Traceback" not in logs[0].read_text()
    assert steps_logged(output) < 4 * EPOCHS, "the fault came after the last step"
    workers.run(run, 2, file, timeout_s=START_S)
    assert_same_weights(output, undisturbed)


def has_ended(started: list[subprocess.Popen[bytes]]) -> bool:
    return any(machine.poll() is not None for machine in started)


def assert_same_weights(output: Path, expected: Path) -> None:
    ours, theirs = exported(output), exported(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_machine_may_join_late(files, undisturbed, tmp_path):
    output = tmp_path / "run"
    with two_nodes() as nodes:
        started = []
        for node in nodes:
            command = static_command(node, 1, config(files, output))
            started.append(node.start(command, tmp_path / f"{node.name}.log"))
            if node.rank == 0:
                time.sleep(HEARTBEAT_TIMEOUT_S + 5)
        assert [machine.wait(START_S) for machine in started] == [0, 0]
    assert_same_weights(output, undisturbed)


def test_an_elastic_run_continues_on_the_machine_that_is_left(
    files, workers, undisturbed, tmp_path
):
    """As a run that is resumed by hand on one machine, from the same checkpoint."""
    output, log = tmp_path / "run", tmp_path / "a.log"
    with two_nodes() as (first, second):
        machine = first.start(elastic_command(first, config(files, output)), log)
        second.start(elastic_command(second, config(files, output)), tmp_path / "b.log")
        wait_until(lambda: steps_logged(output) >= 15 or has_ended([machine]), START_S)
        second.signal(signal.SIGKILL)
        assert machine.wait(START_S) == 0, log.read_text()
    (step,) = re.findall(r"resuming from step (\d+)", log.read_text())
    by_hand = tmp_path / "by_hand"
    for saved in (output / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) <= int(step):
            shutil.copytree(saved, by_hand / "checkpoints" / saved.name)
    workers.run(run, 1, config(files, by_hand), timeout_s=START_S)
    assert_same_weights(output, by_hand)
    assert relative_difference(exported(output), exported(undisturbed)) < TOLERANCE

"""Two machines start together, and one of them fails before its process has joined the other's.

A process on one machine sleeps before it imports torch, so that the fault comes in time.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED

from .two_node_runs import HEARTBEAT_TIMEOUT_S, START_S, config
from .two_nodes import PORT, Node, static_command, two_nodes, wait_until, why_not

pytestmark = [
    pytest.mark.distributed,
    # Two machines import torch twice each.
    pytest.mark.exhaustive,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

END_S = HEARTBEAT_TIMEOUT_S + 20.0
"""As in `test_faults.py`."""

ESTABLISHED = "01"
"""In the kernel's table of connections."""

SLOW = """
import os, time
if "LOCAL_RANK" in os.environ:
    time.sleep(float(os.environ.get("SLOW_START_S", "0")))
"""
"""Python runs it before a program if it is found as `sitecustomize`."""


@dataclass(frozen=True)
class Fault:
    """What happens to the second machine, or to the first."""

    inject: Callable[[Node, Node], object]
    code: int
    """Exit code of the other machine."""

    message: str
    to: int = 1


FAULTS = {
    "machine killed": Fault(
        lambda a, b: b.signal(signal.SIGKILL),
        EXIT_PEER_LOST,
        "the launcher of rank 1 (host node-b) is silent for 1",
    ),
    "cable cut": Fault(
        lambda a, b: b.cable("down"),
        EXIT_PEER_LOST,
        "the launcher of rank 1 (host node-b) is silent for 1",
    ),
    "process killed": Fault(
        lambda a, b: b.signal(signal.SIGKILL, b.workers()),
        EXIT_PEER_LOST,
        "rank 1 (host node-b) has ended with exit code -9, before all processes have joined",
    ),
    "preempted": Fault(
        lambda a, b: b.signal(signal.SIGTERM, b.launcher()),
        EXIT_PREEMPTED,
        "rank 1 (host node-b) was stopped by a signal, before all processes have joined",
    ),
    "first machine killed": Fault(
        lambda a, b: a.signal(signal.SIGKILL), EXIT_PEER_LOST, "megatron-idpo: error", to=0
    ),
    "first machine cut": Fault(
        lambda a, b: a.cable("down"), EXIT_PEER_LOST, "does not answer, before all", to=0
    ),
}


def start(nodes, logs: Path, file: str, slow: int, seconds: float) -> list[subprocess.Popen[bytes]]:
    """Start `train` on both machines; processes on `slow` need so much longer."""
    hook = logs / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(SLOW)
    return [
        node.start(
            static_command(node, 1, file),
            logs / f"{node.name}.log",
            before=f"export PYTHONPATH={hook}:$PYTHONPATH",
            SLOW_START_S=str(seconds if node.rank == slow else 0.0),
        )
        for node in nodes
    ]


def is_joining(node: Node) -> bool:
    """Whether the process there waits for the other one: it is connected with the store."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{node.workers()[0]}/net/{name}").read_text().splitlines()[1:]
    ]
    to_store = [row for row in rows if int(row[2].rpartition(":")[2], 16) == PORT]
    # The launcher and its beats, the process and its watch.
    return [row[3] for row in to_store].count(ESTABLISHED) >= 4


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_before_all_have_joined_ends_the_other_machine(name, files, tmp_path):
    fault = FAULTS[name]
    other = 1 - fault.to
    with two_nodes() as nodes:
        started = start(nodes, tmp_path, config(files, tmp_path / "run"), fault.to, 600.0)
        wait_until(lambda: bool(nodes[0].workers() and nodes[1].workers()), START_S)
        wait_until(lambda: is_joining(nodes[other]), START_S)
        start_s = time.monotonic()
        fault.inject(*nodes)
        code = started[other].wait(START_S)
        report = (tmp_path / f"{nodes[other].name}.log").read_text()
        print(f"{name}: {time.monotonic() - start_s:.1f} s\n{report}")
    assert code == fault.code, report
    assert fault.message in report
    assert "Traceback" not in report
    assert time.monotonic() - start_s < END_S


def test_a_machine_that_starts_slowly_is_waited_for(files, tmp_path):
    """Three times as long as silence may be."""
    with two_nodes() as nodes:
        file = config(files, tmp_path / "run")
        started = start(nodes, tmp_path, file, 1, 3 * HEARTBEAT_TIMEOUT_S)
        codes = [machine.wait(START_S) for machine in started]
        assert codes == [0, 0], (tmp_path / "a.log").read_text()

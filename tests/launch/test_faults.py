"""Two machines train together, and one of them fails: who ends, when, with which message and code.

Every run is started again afterwards and must end as if nothing had happened. The machines are
network namespaces, whose commands are those of `launch/slurm.sh`.
"""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED
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
from .two_nodes import Node, two_nodes, why_not

pytestmark = [
    pytest.mark.distributed,
    # Two machines import torch twice each; the normal run has
    # `test_a_stopped_process_ends_the_others_with_the_exit_code`.
    pytest.mark.exhaustive,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

END_S = HEARTBEAT_TIMEOUT_S + 20.0
"""Silence, the next heartbeat, the time to end, and that of `launch/node.py`, on a busy machine."""


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
NO_HEARTBEAT = rf"{IS_LOST}no heartbeat for 1\d s"
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
    "preempted": Fault(
        lambda a, b: b.signal(signal.SIGTERM, b.launcher()),
        (EXIT_PREEMPTED, EXIT_PREEMPTED),
        "stopped by a signal",
    ),
}


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
        for machine, code in zip(started, fault.codes, strict=True):
            if code is not None:
                assert machine.wait(START_S) == code, logs[fault.reporter].read_text()
        print(f"{name}: {time.monotonic() - start_s:.1f} s")
        assert time.monotonic() - start_s < END_S
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

"""launch/node.py: signals reach the workers, and their exit codes whoever started it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

from .commands import LAUNCH, ROOT, load_script
from .test_slurm import Slurm

node = load_script("node")

WORKER = '''
"""A trainer that does nothing: asked to stop, all ranks agree, save and end with 75."""
import os, signal, sys, time
from pathlib import Path

mode, directory = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["RANK"])
stop = directory / "stop"  # stands for the collective in which the ranks agree
if mode not in ("deaf", "fails"):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.touch())
(directory / f"ready-{rank}").touch()
if mode == "fails":
    sys.exit(int(sys.argv[3]) if rank == 0 else time.sleep(60))
while not stop.exists():
    time.sleep(0.05)
if mode == "slow":
    time.sleep(3)
(directory / f"saved-{rank}").touch()
sys.exit(75)
'''

PATIENCE_S = 180.0  # importing torch takes seconds, on a busy machine many of them


@pytest.mark.parametrize(
    ("codes", "stopped", "code"),
    [
        ([75], True, 75),
        ([75, 75], False, 75),  # another machine was told to stop
        ([-signal.SIGTERM, 75], True, 75),
        ([-signal.SIGUSR1], True, 75),
        ([-signal.SIGTERM], False, 143),  # somebody killed a worker
        ([-signal.SIGKILL], True, 137),  # too slow, or out of memory
        ([2, 2], False, 2),
        ([75, 1], True, 1),
        ([3, 2], False, 2),
        ([1, 3, 2], False, 2),  # a user's mistake says most
        ([3, 1, -signal.SIGKILL], False, 1),  # a lost peer says least
        ([3, 75, -signal.SIGKILL], False, 137),
        ([3, 3], False, 3),
        ([-signal.SIGSEGV, 75], True, 139),
    ],
)
def test_exit_codes(codes: list[int], stopped: bool, code: int) -> None:
    assert node.exit_code(codes, stopped=stopped) == code


# ---- real processes -------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Machines:
    """Processes of launch/node.py, one a machine, with workers in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.worker = directory / "worker.py"
        self.worker.write_text(WORKER)
        self.port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *worker: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """One more machine; `worker` is its mode and what that takes."""
        address = ("--master-addr", "127.0.0.1", "--master-port", str(self.port))
        script = (str(self.worker), worker[0], str(self.directory), *worker[1:])
        machine = subprocess.Popen(
            [sys.executable, str(LAUNCH / "node.py"), *address, *options, *script],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(machine)
        return machine

    def wait_until_ready(self, num_ranks: int) -> None:
        ready = [self.directory / f"ready-{rank}" for rank in range(num_ranks)]
        wait_for(lambda: all(path.exists() for path in ready))

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("saved-*"))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    yield found
    (tmp_path / "stop").touch()
    for machine in found.started:
        if machine.poll() is None:
            machine.terminate()
        machine.communicate(timeout=PATIENCE_S)


def test_all_machines_end_with_75_when_one_is_told_to_stop(machines: Machines) -> None:
    """SIGUSR1 would end torchrun and leave its workers behind."""
    first, second = (
        machines.start("runs", options=("--nnodes", "2", "--node-rank", rank)) for rank in "01"
    )
    machines.wait_until_ready(2)
    second.send_signal(signal.SIGUSR1)
    assert (first.wait(PATIENCE_S), second.wait(PATIENCE_S)) == (EXIT_PREEMPTED, EXIT_PREEMPTED)
    assert machines.saved() == ["saved-0", "saved-1"]


def test_workers_take_their_time_to_save(machines: Machines) -> None:
    """torchrun would kill them when its own patience ends."""
    options = ("--nproc-per-node", "2", "--shutdown-timeout", "1")
    machine = machines.start("slow", options=options)
    machines.wait_until_ready(2)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(PATIENCE_S) == EXIT_PREEMPTED
    assert "saved-0" in machines.saved()


def test_a_worker_that_does_not_listen_yet_has_nothing_to_save(machines: Machines) -> None:
    machine = machines.start("deaf")
    machines.wait_until_ready(1)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(PATIENCE_S) == EXIT_PREEMPTED


def test_a_signal_while_waiting_for_other_machines_ends_it(machines: Machines) -> None:
    """Python's own handlers would not run there, in the C++ of the rendezvous."""
    machine = machines.start("runs", options=("--nnodes", "2", "--node-rank", "1"))
    wait_for(lambda: _listens(machine.pid))
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(PATIENCE_S) == EXIT_PREEMPTED
    assert not list(machines.directory.glob("ready-*"))


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("code", "tells"), [(EXIT_USER_ERROR, False), (3, True)])
def test_a_failure_keeps_its_code(machines: Machines, code: int, tells: bool) -> None:
    """And ends the machine's other workers. What the user has to mend was told by the worker."""
    machine = machines.start("fails", str(code), options=("--nproc-per-node", "2"))
    _, message = machine.communicate(timeout=PATIENCE_S)
    assert machine.returncode == code
    assert ("Root Cause" in message) == tells


def test_a_port_in_use_is_reported(machines: Machines) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", machines.port))
        other.listen()
        machine = machines.start("runs")
        _, message = machine.communicate(timeout=PATIENCE_S)
    assert machine.returncode == 1
    assert str(machines.port) in message and "choose another --master-port" in message
    assert "Traceback" not in message


def test_a_signal_reaches_the_queue_through_all_of_it(tmp_path: Path) -> None:
    """Slurm's script, two machines, their workers: told to stop, saved, queued again."""
    slurm = Slurm(tmp_path)
    machines = Machines(tmp_path)
    python = slurm.program(
        "python_fake",
        f'words="$*"; set -- ${{words/-m megatron_idpo train/{machines.worker} runs {tmp_path}}}\n'
        f'exec {sys.executable} "$@"',
    )
    hosts = slurm.bin / "scontrol"
    hosts.write_text(hosts.read_text().replace("one\\ntwo", "127.0.0.1\\n127.0.0.1"))
    settings = {
        "PYTHON": str(python),
        "MASTER_PORT": str(machines.port),
        "GPUS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        [LAUNCH / "slurm.sh", "examples/llama3_70b.yaml"], env=slurm.env | settings, cwd=ROOT
    )
    machines.wait_until_ready(2)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(PATIENCE_S) == EXIT_PREEMPTED
    assert machines.saved() == ["saved-0", "saved-1"]
    assert slurm.has_requeued()

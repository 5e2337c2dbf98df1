"""launch/node.py: forwards signals to the workers and exits with their code."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_idpo.cli import agent
from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

from .commands import LAUNCH, ROOT, check_command, load_script
from .test_slurm import Slurm

node = load_script("node")

WORKER = '''
"""A trainer that does nothing: on a signal, all ranks stop, save and exit with 75."""
import os, signal, sys, time
from pathlib import Path

mode, directory = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["RANK"])
if mode in ("grows", "even"):  # a separate world for each size
    if mode == "even" and rank == 0:
        from megatron_idpo.mcore.watchdog.launch_notes import Launch, set_usable
        set_usable(Launch.from_environment().connect(60.0), [2, 4])
    directory /= os.environ["WORLD_SIZE"]
    directory.mkdir(exist_ok=True)
stop = directory / "stop"  # in place of the collective in which the ranks agree
if mode not in ("no-handler", "fails"):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.touch())
(directory / f"ready-{rank}").touch()
if mode == "fails":
    sys.exit(int(sys.argv[3]) if rank == 0 else time.sleep(60))
while not stop.exists():
    time.sleep(0.05)
if mode == "slow":
    time.sleep(1.5)
(directory / f"saved-{rank}").touch()
sys.exit(75)
'''

TIMEOUT_S = 180.0
"""Importing torch takes many seconds on a busy machine."""

WAIT_S = 20.0


@pytest.mark.parametrize(
    ("codes", "stopped", "code"),
    [
        ([75], True, 75),
        ([75, 75], False, 75),  # another machine received the signal
        ([-signal.SIGTERM, 75], True, 75),
        ([-signal.SIGUSR1], True, 75),
        ([-signal.SIGTERM], False, 143),  # a worker was killed
        ([-signal.SIGKILL], True, 137),  # killed while saving, or out of memory
        ([2, 2], False, 2),
        ([75, 1], True, 1),
        ([3, 2], False, 2),
        ([1, 3, 2], False, 2),  # a user error has priority
        ([3, 1, -signal.SIGKILL], False, 1),  # a lost peer has the lowest priority
        ([3, 75, -signal.SIGKILL], False, 137),
        ([3, 3], False, 3),
        ([-signal.SIGSEGV, 75], True, 139),
    ],
)
def test_exit_codes(codes: list[int], stopped: bool, code: int) -> None:
    assert node.exit_code(codes, stopped=stopped) == code


@pytest.mark.parametrize(
    ("before", "received"), [(signal.SIG_DFL, signal.SIGTERM), (signal.SIG_IGN, None)]
)
def test_a_closed_terminal_stops_and_saves_unless_nohup_ignores_it(monkeypatch, before, received):
    started: list[Sequence[str]] = []
    monkeypatch.setattr(node, "torchrun", started.append)
    monkeypatch.setattr(node, "use_agent", lambda _: None)
    for variable in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", agent.LAUNCHER_PID):
        monkeypatch.setenv(variable, "1")  # restored after the test
    restored = signal.signal(signal.SIGHUP, before)
    try:
        assert agent.SignalForwarder().signals.get(signal.SIGHUP) == received
        assert node.main([]) == 0
        assert signal.getsignal(signal.SIGHUP) == before, "nothing handles it afterwards"
    finally:
        signal.signal(signal.SIGHUP, restored)
    assert started[0][0] == "--signals-to-handle" and "SIGHUP" not in started[0][1], "torchrun"


# ---- real processes -------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "condition not reached in time"
        time.sleep(0.05)


class Machines:
    """Processes of launch/node.py, one per machine, whose workers write to `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.worker = directory / "worker.py"
        self.worker.write_text(WORKER)
        self.port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *worker: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start one machine; `worker` is the worker's mode and arguments."""
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
    machines = Machines(tmp_path)
    yield machines
    (tmp_path / "stop").touch()
    for machine in machines.started:
        if machine.poll() is None:
            machine.terminate()
        machine.communicate(timeout=TIMEOUT_S)


@pytest.mark.exhaustive  # test_signal_to_a_slurm_job forwards the same signal
def test_signal_to_one_machine_stops_all_with_exit_code_75(machines: Machines) -> None:
    """Without node.py, SIGUSR1 ends torchrun and not its workers."""
    first, second = (
        machines.start("runs", options=("--nnodes", "2", "--node-rank", rank)) for rank in "01"
    )
    machines.wait_until_ready(2)
    second.send_signal(signal.SIGUSR1)
    assert (first.wait(TIMEOUT_S), second.wait(TIMEOUT_S)) == (EXIT_PREEMPTED, EXIT_PREEMPTED)
    assert machines.saved() == ["saved-0", "saved-1"]


@pytest.mark.exhaustive  # the decision is in `test_workers_that_were_stopped_for_a_new_machine_...`
def test_a_machine_that_joins_restarts_all_others(machines: Machines) -> None:
    """Repeatedly: agents do not notice the new machine at the same moment."""
    rendezvous = ("--nnodes", "1:4", "--max-restarts", "1", "--rdzv-backend", "c10d")
    rendezvous += ("--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{machines.port}")
    rendezvous += ("--rdzv-conf", "last_call_timeout=1,is_host=")
    for size in range(1, 5):
        host = f"{rendezvous[-1]}{int(size == 1)}"
        machines.start("grows", options=(*rendezvous[:-1], host))
        ready = [machines.directory / str(size) / f"ready-{rank}" for rank in range(size)]
        wait_for(lambda ready=ready: all(path.exists() for path in ready))
        assert all(machine.poll() is None for machine in machines.started)
    machines.started[1].send_signal(signal.SIGTERM)
    codes = [machine.wait(TIMEOUT_S) for machine in machines.started]
    assert codes == [EXIT_PREEMPTED] * 4


@pytest.mark.exhaustive  # the decision is in `test_agent.py`
def test_a_machine_that_does_not_fit_waits_for_another_one(machines: Machines) -> None:
    rendezvous = ("--nnodes", "2:4", "--rdzv-backend", "c10d", "--rdzv-id", "test")
    rendezvous += ("--rdzv-endpoint", f"127.0.0.1:{machines.port}")
    rendezvous += ("--rdzv-conf", "last_call_timeout=1,is_host=")
    for index in range(4):
        host = f"{rendezvous[-1]}{int(index == 0)}"
        machines.start("even", options=(*rendezvous[:-1], host))
        if index == 1:
            wait_for(
                lambda: all((machines.directory / f"2/ready-{rank}").exists() for rank in "01")
            )
        if index == 2:
            # Longer than torchrun's rendezvous keeps a machine that sends no keep-alive.
            time.sleep(WAIT_S)
            assert not (machines.directory / "3").exists()
    wait_for(lambda: all((machines.directory / f"4/ready-{rank}").exists() for rank in range(4)))
    assert all(machine.poll() is None for machine in machines.started)
    machines.started[0].send_signal(signal.SIGTERM)
    outputs = [machine.communicate(timeout=TIMEOUT_S) for machine in machines.started]
    assert [machine.returncode for machine in machines.started] == [EXIT_PREEMPTED] * 4
    errors = "".join(error for _, error in outputs)
    assert errors.count("3 machines do not fit the run (2, 4 do), so the run continues on 2") == 1


def test_workers_may_save_longer_than_torchruns_shutdown_timeout(machines: Machines) -> None:
    options = ("--nproc-per-node", "2", "--shutdown-timeout", "1")
    machine = machines.start("slow", options=options)
    machines.wait_until_ready(2)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(TIMEOUT_S) == EXIT_PREEMPTED
    assert "saved-0" in machines.saved()


@pytest.mark.exhaustive  # test_exit_codes has the same codes
def test_worker_without_signal_handler_counts_as_stopped(machines: Machines) -> None:
    machine = machines.start("no-handler")
    machines.wait_until_ready(1)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(TIMEOUT_S) == EXIT_PREEMPTED


def test_signal_during_the_rendezvous_ends_the_machine(machines: Machines) -> None:
    """Python's signal handlers do not run inside the C++ rendezvous."""
    machine = machines.start("runs", options=("--nnodes", "2", "--node-rank", "1"))
    wait_for(lambda: _handles_sigterm(machine.pid))
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(TIMEOUT_S) == EXIT_PREEMPTED
    assert not list(machines.directory.glob("ready-*"))


def _handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("code", "prints"),
    [(EXIT_USER_ERROR, False), pytest.param(3, True, marks=pytest.mark.exhaustive)],
)
def test_failure_keeps_its_exit_code(machines: Machines, code: int, prints: bool) -> None:
    """The machine's other workers end too. A user error was printed by the worker."""
    machine = machines.start("fails", str(code), options=("--nproc-per-node", "2"))
    _, message = machine.communicate(timeout=TIMEOUT_S)
    assert machine.returncode == code
    assert ("Root Cause" in message) == prints


def test_port_in_use_is_reported(machines: Machines) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", machines.port))
        listener.listen()
        machine = machines.start("runs")
        _, message = machine.communicate(timeout=TIMEOUT_S)
    assert machine.returncode == 1
    assert str(machines.port) in message and "choose another --master-port" in message
    assert "Traceback" not in message


def test_signal_to_a_slurm_job_saves_and_requeues_it(tmp_path: Path) -> None:
    """Through slurm.sh, two machines and their workers."""
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
    assert job.wait(TIMEOUT_S) == EXIT_PREEMPTED
    assert machines.saved() == ["saved-0", "saved-1"]
    assert slurm.has_requeued()


def test_ssh_loop_of_the_readme_starts_the_command_of_every_machine(tmp_path: Path) -> None:
    """With a stand-in for ssh that writes its arguments to a file."""
    text = (LAUNCH / "README.md").read_text()
    loop = next(part for part in text.split("```bash\n") if part.startswith("hosts=("))
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/bash\nprintf "%s\\n" "$3" >{tmp_path}/"$2"\n')
    ssh.chmod(0o755)
    subprocess.run(
        ["bash", "-c", loop.split("```")[0]],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    for rank, host in enumerate(("node1", "node2")):
        directory, command = (tmp_path / host).read_text().split(" && ")
        assert directory == f"cd {ROOT}"
        words = shlex.split(command)
        check_command(words, nodes=2, rank=rank)
        assert words[words.index("--master-addr") + 1] == "node1"

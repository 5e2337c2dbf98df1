"""Two "machines" on one: network namespaces with host names, joined by a cable that can be cut.

Needs root and iproute2. `why_not` says what is missing, for `pytest.skip`.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .commands import LAUNCH, ROOT

NODES = ("a", "b")
PORT = 29500
"""Of the rendezvous; every pair of namespaces has its ports to itself."""

_counter = itertools.count()


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "setpriv") if shutil.which(name) is None]:
        return f"network namespaces need {', '.join(missing)}"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Node:
    """One machine: what runs in its namespace."""

    name: str
    rank: int
    namespace: str
    interface: str
    address: str

    def start(
        self, command: Sequence[str], log: Path, *, before: str = ":", **env: str
    ) -> subprocess.Popen[bytes]:
        """Start a command here, under the host name `node-NAME`.

        Args:
            command: its words.
            log: what it prints is appended.
            before: shell commands; what they mount exists on this machine only.
            **env: more environment variables.
        """
        set_name = f'hostname "$0"; {before}; exec "$@"'
        # Processes of their own, which all end with this one.
        machine = ["setpriv", "--pdeathsig", "KILL", "unshare", "--uts", "--pid", "--fork"]
        machine += ["--kill-child", "--mount-proc"]
        shell = [*machine, "bash", "-c", set_name, f"node-{self.name}"]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *shell, *command],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": self.interface,
                    **env,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def pids(self) -> list[int]:
        """Of every process here."""
        words = ["ip", "netns", "pids", self.namespace]
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in listed.split()]

    def workers(self) -> list[int]:
        """Of the ranks here."""
        return [pid for pid in self.pids() if _is_rank(pid)]

    def launcher(self) -> list[int]:
        """Of `launch/node.py`, which gets the scheduler's signals."""
        return [pid for pid in self.pids() if _words(pid)[1:2] == [str(LAUNCH / "node.py")]]

    def signal(self, number: int, pids: Sequence[int] | None = None) -> None:
        """Send a signal to some processes here, by default to all."""
        for pid in self.pids() if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def cable(self, state: str) -> None:
        """`down` cuts the cable on this side, `up` connects it again."""
        subprocess.run(
            ["ip", "-n", self.namespace, "link", "set", self.interface, state], check=True
        )


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with a cable; everything that runs there is killed at the end."""
    _remove_abandoned()
    tag = str(os.getpid() * 100 + next(_counter) % 100)
    nodes = tuple(
        Node(name, rank, f"idpo-{tag}-{name}", f"v{tag}{name}"[-15:], f"10.77.0.{rank + 1}")
        for rank, name in enumerate(NODES)
    )
    first, second = nodes
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
        _ip("link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        for node in nodes:
            _ip("link", "set", node.interface, "netns", node.namespace)
            address = f"{node.address}/24"
            _ip("-n", node.namespace, "addr", "add", address, "dev", node.interface)
            for interface in ("lo", node.interface):
                _ip("-n", node.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for node in nodes:
            with suppress(subprocess.CalledProcessError):
                node.signal(signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)


def static_command(node: Node, processes: int, *words: str) -> list[str]:
    """The command line that `launch/slurm.sh` prints for a machine."""
    return [
        *(sys.executable, str(LAUNCH / "node.py"), "--node-rank", str(node.rank)),
        *("--nnodes", "2", "--nproc-per-node", str(processes)),
        *("--master-addr", "10.77.0.1", "--master-port", str(PORT)),
        *("-m", "megatron_idpo", "train", *words),
    ]


def elastic_command(node: Node, *words: str) -> list[str]:
    """A machine of a run that continues without the other one."""
    host = f"join_timeout=300,last_call_timeout=5,is_host={int(node.rank == 0)}"
    return [
        *(sys.executable, str(LAUNCH / "node.py"), "--nnodes", "1:2", "--max-restarts", "2"),
        *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"),
        *("--rdzv-endpoint", f"10.77.0.1:{PORT}", "--local-addr", node.address),
        *("--rdzv-conf", host, "-m", "megatron_idpo", "train", *words),
    ]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait for a condition; returns the seconds that it took.

    Raises:
        TimeoutError: it did not hold in time.
    """
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > timeout_s:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - start_s


def _remove_abandoned() -> None:
    """Remove namespaces whose test was killed; their processes have ended with it."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        if (
            name.startswith("idpo-")
            and not Path(f"/proc/{int(name.split('-')[1]) // 100}").exists()
        ):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _words(pid: int) -> list[str]:
    """The command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        return b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    return False

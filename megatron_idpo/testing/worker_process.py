"""The pool's end of one worker process: start it, look into it, end it.

What: `WorkerProcess` runs `megatron_idpo.testing.worker` in a session of its own and holds the pipe
to it. Why not `multiprocessing.Process`: Megatron-Core's checkpoint writers start processes
themselves, which daemonic processes may not, and a non-daemonic one would outlive a test run; this
one ends with its pipe. Nor does it import the caller's `__main__`.

What it does not do: decide when a worker is broken; that is `WorkerPool`'s.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_EXIT_GRACE_S = 5.0
_STACK_GRACE_S = 1.0
_POLL_S = 0.01


class WorkerProcess:
    """One process and the pipe to it; it becomes usable with its `Ready` message."""

    def __init__(self, stacks: Path) -> None:
        """Start the process; `stacks` is the file it writes its Python stack to when asked."""
        self.stacks = stacks
        stacks.touch()
        self.connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            program = [sys.executable, "-m", "megatron_idpo.testing.worker"]
            self.process = subprocess.Popen(
                [*program, str(descriptor), str(stacks)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                # Its own session, so that a kill takes its children with it.
                start_new_session=True,
            )

    @property
    def is_idle(self) -> bool:
        """Whether the process waits for a call; one that has ended shows as a readable pipe."""
        return not self.connection.poll()

    def receive(self) -> Any:
        """The next message, or None if the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def ending(self) -> str:
        """How a process whose pipe has ended came to its end, for an error message."""
        self.kill()
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stack(self) -> str:
        """The Python stack of a running process, or what a crashed one left; may be empty."""
        before = size = self.stacks.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _STACK_GRACE_S
        while self.process.returncode is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            previous, size = size, self.stacks.stat().st_size
            # The dump is written frame by frame, and done when it has stopped growing.
            if before < previous == size:
                break
        return self.stacks.read_text()

    def close(self) -> None:
        """Close the pipe and give the process a moment to end by itself before it is killed."""
        self.connection.close()
        try:
            self.process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process and its children now."""
        self.connection.close()
        # Not once it was waited for: its number may then be another process's.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _environment() -> dict[str, str]:
    """This process's environment, made one for a single-threaded CPU worker."""
    search_path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        # Megatron-Core warns without it under tensor and sequence parallelism.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(search_path),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Gloo would otherwise resolve the host name, which need not lead to one of our interfaces.
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment

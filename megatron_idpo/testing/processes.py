"""Worker processes as the pool sees them: the fork server, and the processes that it forks."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_idpo.testing.messages import MESSAGE_BYTES, SERVER_READY, Fork, Signal, dumps

_SERVER = "megatron_idpo.testing.fork_server"


class ForkServer:
    """The pool's end: starts the server process, and workers through it."""

    def __init__(self, environment: Mapping[str, str], start_timeout_s: float) -> None:
        """Start the server process with this environment; `fork` waits for its imports."""
        self._start_timeout_s = start_timeout_s
        # Datagrams in order: a message is one read, with its descriptors.
        self._socket, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SERVER, str(server_end.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[server_end.fileno()],
                start_new_session=True,
            )
        self._is_ready = False

    @property
    def is_running(self) -> bool:
        """Whether the server process has not ended."""
        return self._process.poll() is None

    def fork(self, stacks: Path, worker_end: Connection) -> "ForkedProcess":
        """Start a worker on its end of a pipe.

        Raises:
            ChildProcessError: the server ended, or is not ready in time.
        """
        if not self._is_ready:
            self._socket.settimeout(self._start_timeout_s)
            self._is_ready = self._receive() == SERVER_READY
        read_end, write_end = os.pipe()
        try:
            request = dumps(Fork(str(stacks)))
            socket.send_fds(self._socket, [request], [worker_end.fileno(), write_end])
            pid = int(self._receive())
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return ForkedProcess(self, pid, read_end)

    def signal(self, pid: int, number: int, *, is_group: bool) -> None:
        """Send a signal; nothing happens if the worker or the server has ended."""
        # By the server, which also reaps: a pid that it still holds is no other process's.
        with contextlib.suppress(OSError):
            self._socket.send(dumps(Signal(pid, number, is_group)))

    def close(self) -> None:
        """End the server; it kills the workers that are left."""
        self._socket.close()
        self._process.wait()

    def _receive(self) -> bytes:
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise ChildProcessError(
                f"the fork server was not ready within {self._start_timeout_s:.0f} s"
            ) from None
        if not message:
            code = self._process.wait()
            raise ChildProcessError(f"the fork server ended (exit code {code}); see above")
        return message


class ForkedProcess:
    """A worker process as the pool sees it; the interface is that of `subprocess.Popen`."""

    def __init__(self, server: ForkServer, pid: int, exit_codes: int) -> None:
        """The worker `pid`, whose exit code will arrive on the descriptor `exit_codes`."""
        self.pid = pid
        self._server = server
        self._exit_codes = open(exit_codes, "rb", buffering=0)
        self._code: int | None = None

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout_s=0.0)
        return self._code

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the process has ended.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout_s`.
        """
        if self._code is None:
            if not select.select([self._exit_codes], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout_s or 0.0)
            # Empty if the server was killed, which ends its workers as well.
            self._code = int(self._exit_codes.read(32) or -signal.SIGKILL)
            self._exit_codes.close()
        return self._code

    def send_signal(self, number: int, *, is_group: bool = False) -> None:
        """Send a signal to the process, or to it and its children, if it runs."""
        if self.returncode is None:
            self._server.signal(self.pid, number, is_group=is_group)

"""A process that imports torch and Megatron-Core once, and forks a worker for each request.

The imports take seconds of CPU time, a fork of the finished process takes milliseconds, and the
pages of the imported modules are shared. The pool's end is `processes.ForkServer`, the messages are
in `messages.py`.

The server ends when its socket is closed, also if the pool's process was killed, and kills its
workers then: a worker that waits for another rank would not notice it. If the server is killed
itself, or fails, Linux kills its workers.

Only a single-threaded process may fork: threads do not exist in the child, but the locks they hold
do. So the server imports without starting threads, and checks it.

Run as `python -m megatron_idpo.testing.fork_server DESCRIPTOR`. Torch is not imported with this
module: processes that Megatron-Core's checkpoint writers start import it as their `__main__`.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading

from megatron_idpo.testing.messages import MESSAGE_BYTES, SERVER_READY, Fork, Signal, loads

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(descriptor: int) -> None:
    """Serve requests until the socket closes; in a forked process, be the worker."""
    from megatron_idpo.testing import worker

    os.set_inheritable(descriptor, False)
    worker.prepare()
    # Exclude imported modules from garbage collection, which would copy their shared pages.
    gc.freeze()
    assert threading.active_count() == 1, "a forked worker would miss threads of the server"
    with socket.socket(fileno=descriptor) as requests:
        forked = _serve(requests)
    if forked is not None:
        # Outside the server's loop, so that the worker ends like any other program.
        worker.main(*forked)


def _serve(requests: socket.socket) -> tuple[int, str] | None:
    """None at the end; in a worker, the descriptor of its pipe and the file for its stacks."""
    exits: dict[int, int] = {}
    """pid of a running worker -> descriptor of the pipe for its exit code."""
    ended_read, ended_write = os.pipe()
    os.set_blocking(ended_write, False)
    # Only a signal with a handler writes to the wakeup descriptor.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ended_write)
    requests.send(SERVER_READY)
    while True:
        readable, _, _ = select.select([requests.fileno(), ended_read], [], [])
        if ended_read in readable:
            os.read(ended_read, 4096)
            _report_ended(exits)
        if requests.fileno() not in readable:
            continue
        message, descriptors, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
        if not message:
            break
        request: Fork | Signal = loads(message)
        if isinstance(request, Signal):
            if request.pid in exits:
                send = os.killpg if request.is_group else os.kill
                send(request.pid, request.number)
            continue
        worker_end, exit_codes = descriptors
        server = os.getpid()
        if (pid := os.fork()) == 0:
            end_with_parent(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A separate session, so that a signal can include its children.
            os.setsid()
            for opened in (ended_read, ended_write, exit_codes, *exits.values()):
                os.close(opened)
            return worker_end, request.stacks
        os.close(worker_end)
        exits[pid] = exit_codes
        requests.send(str(pid).encode())
    for pid in exits:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when its parent ends, however it ends. Linux only.

    Args:
        parent: its process id, taken before this process was forked. The thread that has forked it
            must live as long as the parent, because the system means that thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # ended before the call
            os._exit(1)


def _report_ended(exits: dict[int, int]) -> None:
    """Reap the workers that ended, and write their exit codes."""
    for pid in list(exits):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            exit_codes = exits.pop(pid)
            # The pool may have been closed meanwhile.
            with contextlib.suppress(BrokenPipeError):
                os.write(exit_codes, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(exit_codes)


if __name__ == "__main__":
    main(int(sys.argv[1]))

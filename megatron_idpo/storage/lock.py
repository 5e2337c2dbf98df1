"""A lock file that one process at a time holds, released by the system when the process ends.

There is no fallback for file systems without locks (Lustre mounted without `flock`): a marker file
would outlive a killed process and block the run that resumes. The caller reports the `OSError`.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, OutputLockedError
from megatron_idpo.machine import boot_id

logger = logging.getLogger(__name__)

_POLL_S = 1.0
"""Between two attempts to take a lock that is waited for with a limit."""

_LOST_HOLDER_S = 120.0
"""For the lock of a process that is lost: a stopped one is killed by its launcher 30 s after its
machine's survivors have ended, and NFS gives up the lock of a machine that is down after 90 s."""


class LockHeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, content: str) -> None:
        """Args: of the lock file; empty if the holder is not known."""
        super().__init__(content)
        self.holder, _, self._boot_id = content.partition("\n")
        """Who wrote the lock file last: `host a, process 12`."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether the holder is on another machine: this one cannot know whether it is alive.

        A machine is known by its boot id too: a pod that replaces another one has its host name.
        """
        is_other_host = f"host {socket.gethostname()}," not in self.holder
        is_other_boot = bool(self._boot_id) and self._boot_id != boot_id()
        return bool(self.holder) and (is_other_host or is_other_boot)


@contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on a file until the end of the block (`flock(2)`).

    Args:
        file: the lock file; created if needed, never deleted. Its directory must exist.
        wait: whether to wait while another process holds the lock.

    Raises:
        LockHeldError: another process holds it and `wait` is False.
        OSError: the file cannot be written, or its file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockHeldError(os.pread(descriptor, 300, 0).decode(errors="replace")) from None
        try:
            _write_holder(descriptor)
            yield
        finally:
            # Closing the descriptor does not release the lock while a forked child has it open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def lock_within(
    enter: Callable[[], object],
    wait_s: Callable[[LockHeldError], float],
    report: Callable[[str], None],
) -> None:
    """Take a lock, and wait for it for a limited time.

    Args:
        enter: takes the lock with `locked`.
        wait_s: how long to wait, from the first failure.
        report: called once, with the holder, if there is something to wait for.

    Raises:
        LockHeldError: another process holds it, and still does after that time.
    """
    until_s: float | None = None
    while True:
        try:
            enter()
            return
        except LockHeldError as error:
            if until_s is None:
                limit_s = wait_s(error)
                until_s = time.monotonic() + limit_s
                if limit_s > 0:
                    report(error.holder)
            if time.monotonic() >= until_s:
                raise
        time.sleep(_POLL_S)


@contextmanager
def locked_directory(directory: Path, location: str) -> Iterator[None]:
    """Holds the lock of a directory that one run at a time writes, until the end of the block.

    The lock of a process that may be lost is waited for.

    Args:
        directory: exists.
        location: of the setting that names it.

    Raises:
        ConfigError: it cannot be locked, or another run has locked it.
        OutputLockedError: likewise, and the lock is probably that of a lost process.
    """
    with ExitStack() as stack:

        def enter() -> None:
            remedy = "name a directory on another file system"
            with ConfigError.on_os_error(location, f"{directory} cannot be locked", remedy):
                stack.enter_context(locked(directory / ".lock"))

        def report(holder: str) -> None:
            seconds = f"{_LOST_HOLDER_S:.0f} s"
            logger.warning("%s is locked by %s; waiting for up to %s", directory, holder, seconds)

        try:
            lock_within(enter, _wait_s, report)
        except LockHeldError as error:
            holder = f" ({error.holder})" if error.holder else ""
            message = f"{directory} is being written by another run{holder}"
            if _wait_s(error):
                remedy = "end that process if it is stopped; the same command resumes "
                remedy += f"({EXIT_PREEMPTED})"
                raise OutputLockedError.at(location, message, remedy) from None
            remedy = "wait for it, or name another directory"
            raise ConfigError.at(location, message, remedy) from None
        yield


def _wait_s(error: LockHeldError) -> float:
    """How long to wait for a lock: it may be that of a process of this run which is lost."""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return _LOST_HOLDER_S if is_restart or error.is_elsewhere else 0.0


def this_process() -> str:
    """As a lock file names its holder: `host a, process 12`."""
    return f"host {socket.gethostname()}, process {os.getpid()}"


def _write_holder(descriptor: int) -> None:
    """Name this process in the lock file, for the message of another one."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{this_process()}\n{boot_id()}".encode(), 0)

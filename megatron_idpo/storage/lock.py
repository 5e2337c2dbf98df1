"""A lock file that one process at a time holds, released by the system when the process ends.

There is no fallback for file systems without locks (Lustre mounted without `flock`): a marker file
would outlive a killed process and block the run that resumes. The caller reports the `OSError`.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockHeldError(Exception):
    """Another process holds the lock."""


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
            raise LockHeldError from None
        try:
            yield
        finally:
            # Closing the descriptor does not release the lock while a forked child has it open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)

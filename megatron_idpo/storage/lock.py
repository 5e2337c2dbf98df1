"""A file that one process at a time holds: the system's lock, which ends with the process.

Nothing stands in for it where a file system has no locks (Lustre mounted without `flock`): a marker
outlives a kill and stops the run that would go on. Who cannot hold a file is told so.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Held(Exception):
    """Another process holds the file."""


@contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a file, made if need be and never deleted, until the end of the block (`flock(2)`).

    Args:
        file: nothing but the lock; its directory is there.
        wait: for whoever holds it.

    Raises:
        Held: somebody does, and `wait` is False.
        OSError: it cannot be written, or its file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Held from None
        try:
            yield
        finally:
            # Closing is not enough where a forked child has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)

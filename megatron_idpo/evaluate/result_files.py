"""Files of results: they appear whole, have one writer, and what the system refuses is told."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from megatron_idpo.errors import ConfigError
from megatron_idpo.storage.lock import Held, locked

PLACE = "evaluate.output"
"""What a user changes to have results elsewhere."""


def check_writable(directory: Path) -> None:
    """Make a directory for results, before hours of work rather than after them.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        message = "is not writable" if not os.access(directory, os.W_OK) else ""
    except OSError as error:
        message = f"cannot be made: {error.strerror or error}"
    if message:
        remedy = "name a directory to write to"
        raise ConfigError.at(PLACE, f"{directory} {message}", remedy)


@contextmanager
def telling(path: Path, done: Literal["read", "written"]) -> Iterator[None]:
    """Within it a file that grows by and by is read or written.

    Raises:
        ConfigError: the system refuses.
    """
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be {done}: {error.strerror or error}"
        remedy = "put that right and start again, or name another directory"
        raise ConfigError.at(PLACE, message, remedy) from None


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Within it no other process writes the file; its directory is made if need be.

    Raises:
        ConfigError: another does, or the directory cannot be written, or has no locks.
    """
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as hold:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hold.enter_context(locked(lock))
        except Held:
            message, remedy = f"{path} is being written by another process", "wait for it"
            raise ConfigError.at(PLACE, message, f"{remedy}, or name another directory") from None
        except OSError as error:
            message = f"{lock} cannot be written: {error.strerror or error}"
            raise ConfigError.at(PLACE, message, "name another directory") from None
        yield


@contextmanager
def appearing(
    path: Path, *, location: str = PLACE, remedy: str = "name a directory to write to"
) -> Iterator[Path]:
    """A file to write that becomes `path` when the block ends well.

    The directory is made if need be. Of two processes that write the same, one has its way.

    Args:
        path: the file; one that is there is replaced.
        location: what a user changes to have it elsewhere.
        remedy: how.

    Raises:
        ConfigError: it cannot be written; nothing is left over.
    """
    fresh = path.with_name(f".{path.name}.fresh-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        os.replace(fresh, path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise ConfigError.at(location, message, remedy) from None
    finally:
        with suppress(OSError):  # not there: it has become the file, or never was
            fresh.unlink()


def write_text(path: Path, text: str) -> None:
    """Write the file, replacing one that is there whole; its directory is made if need be.

    Raises:
        ConfigError: it cannot be written; nothing is left over.
    """
    with appearing(path) as fresh:
        fresh.write_text(text, "utf-8")

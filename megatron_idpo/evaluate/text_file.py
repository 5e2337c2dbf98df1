"""Files of results: small ones appear whole, and what the system refuses is told."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from megatron_idpo.errors import ConfigError


def check_writable(directory: Path) -> None:
    """Make a directory for results, before hours of work rather than after them.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        told = "is not writable" if not os.access(directory, os.W_OK) else ""
    except OSError as error:
        told = f"cannot be made: {error.strerror or error}"
    if told:
        remedy = "name a directory to write to"
        raise ConfigError.at("evaluate.output", f"{directory} {told}", remedy)


@contextmanager
def telling(path: Path, done: Literal["read", "written"]) -> Iterator[None]:
    """Within it a file that grows by and by is read or written.

    Raises:
        ConfigError: the system refuses.
    """
    try:
        yield
    except OSError as error:
        told = f"{path} cannot be {done}: {error.strerror or error}"
        remedy = "put that right and start again, or name another directory"
        raise ConfigError.at("evaluate.output", told, remedy) from None


def write_text(path: Path, text: str) -> None:
    """Write the file, replacing one that is there; its directory is made if need be.

    Of two processes that write it at once, one has its way.

    Raises:
        ConfigError: it cannot be written; nothing is left over.
    """
    fresh = path.with_name(f".{path.name}.fresh-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, "utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            fresh.unlink()
        told = f"cannot write {path}: {error.strerror or error}"
        raise ConfigError.at("evaluate.output", told, "name a directory to write to") from None

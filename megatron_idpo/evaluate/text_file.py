"""A small text file of results, which appears whole."""

import os
from pathlib import Path

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


def write_text(path: Path, text: str) -> None:
    """Write the file, replacing one that is there; its directory is made if need be.

    Raises:
        ConfigError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.fresh")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, "utf-8")
        os.replace(fresh, path)
    except OSError as error:
        told = f"cannot write {path}: {error.strerror or error}"
        raise ConfigError.at("evaluate.output", told, "name a directory to write to") from None

"""A small text file of results, which appears whole."""

import os
from pathlib import Path

from megatron_idpo.errors import ConfigError


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

"""A JSON file that notices every byte that is changed in it.

The text depends on the values alone, and one of them, `sha256`, is the hash of the text without it.
Whoever reads the file makes the text anew and compares: a changed value, name, space or line end
makes a difference. This is against damage and slips of an editor, not against somebody who means
it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_idpo.errors import CheckpointError

SEAL = "sha256"


def write_sealed(path: Path, values: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write the file; a kill at any moment leaves the old one or the new one.

    Args:
        path: the file.
        values: what JSON has; no `sha256` at the top.
        indent: of the text; None for one line.

    Raises:
        CheckpointError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.incomplete")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(_text({**values, SEAL: seal_of(values, indent=indent)}, indent))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise CheckpointError.at(str(path), message, "free some space") from None


def read_sealed(path: Path, *, remedy: str, indent: int | None = 1) -> dict[str, Any]:
    """The values of a file that `write_sealed` wrote with the same indent, without the seal.

    Args:
        path: the file.
        remedy: what to do where it is not what was written.
        indent: as it was written with.

    Raises:
        CheckpointError: there is no such file, or a byte of it has changed.
    """
    try:
        text = path.read_bytes()
        values = json.loads(text)
        seal = values.pop(SEAL)
        is_whole = seal == seal_of(values, indent=indent) and text == _text(
            {**values, SEAL: seal}, indent
        ).encode("utf-8")
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise CheckpointError.at(str(path), message, remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CheckpointError.at(str(path), "has been changed since it was written", remedy)
    return dict(values)


def seal_of(values: dict[str, Any], *, indent: int | None = 1) -> str:
    """The hash that the file of these values carries."""
    return hashlib.sha256(_text(values, indent).encode("utf-8")).hexdigest()


def _text(values: dict[str, Any], indent: int | None) -> str:
    return json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"

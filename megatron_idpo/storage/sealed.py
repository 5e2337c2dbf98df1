"""Sealed JSON files: any change made after writing is detected on reading.

The text of the file is a function of its values, and the value `sha256` is the hash of the text
without it. The reader rebuilds the text and compares bytes, so a changed value, name, space or line
end is detected. This protects against disk errors and accidental edits, not against forgery.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.storage.atomic import write_text
from megatron_idpo.storage.checksums import CHANGED

SEAL = "sha256"


def write_sealed(
    path: Path,
    values: dict[str, Any],
    *,
    indent: int | None = 1,
    error: type[UserError] = CheckpointError,
    remedy: str = "check that its directory exists",
) -> None:
    """Writes the file in one step: after a kill there is the old file or the new one.

    Args:
        path: the file.
        values: values that JSON can represent, without the key `sha256`.
        indent: of the text; None writes one line.
        error: the class to raise.
        remedy: what the user can do if it cannot be written.

    Raises:
        UserError: of class `error`; it cannot be written.
        ValueError: a value is NaN or infinite.
    """
    text = _text({**values, SEAL: seal_of(values, indent=indent)}, indent)
    with error.on_os_error(str(path), "cannot be written", remedy):
        write_text(path, text)


def read_sealed(
    path: Path, *, remedy: str, indent: int | None = 1, error: type[UserError] = CheckpointError
) -> dict[str, Any]:
    """Reads the values of a sealed file, without the seal.

    Args:
        path: the file.
        remedy: what the user can do if the file has been changed.
        indent: the one it was written with.
        error: the class to raise.

    Raises:
        UserError: of class `error`; the file does not exist, or a byte of it has changed.
    """
    with error.on_os_error(str(path), "cannot be read", remedy):
        content = path.read_bytes()
    message = CHANGED
    try:
        values = json.loads(content)
        seal = values.pop(SEAL, None)
        if seal is None:
            message = f"{CHANGED}, or another version wrote it"  # there is no seal
        is_unchanged = seal == seal_of(values, indent=indent)
        is_unchanged &= content == _text({**values, SEAL: seal}, indent).encode("utf-8")
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_unchanged = False
    if not is_unchanged:
        raise error.at(str(path), message, remedy)
    return dict(values)


def seal_of(values: dict[str, Any], *, indent: int | None = 1) -> str:
    """The hash that the file of these values carries, in hexadecimal digits."""
    return hashlib.sha256(_text(values, indent).encode("utf-8")).hexdigest()


def _text(values: dict[str, Any], indent: int | None) -> str:
    return json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"

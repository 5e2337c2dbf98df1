"""Reading what verbs have left: JSON objects and lines of them, with damage told by its place."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_idpo.errors import ConfigError


def read_text(path: Path, remedy: str) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.at(str(path), f"is not UTF-8: {error}", remedy) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise ConfigError.at(str(path), message, remedy) from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file is.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    return _object(read_text(path, remedy), str(path), remedy)


def read_lines(path: Path, remedy: str) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with its place `path:line`.

    A last line that does not end is still being written, or was when its writer was killed: it is
    passed over.

    Raises:
        ConfigError: it cannot be read, or a whole line is no object.
    """
    lines = read_text(path, remedy).split("\n")[:-1]
    locations = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    return [
        (location, _object(line, location, remedy))
        for location, line in zip(locations, lines, strict=True)
        if line.strip()
    ]


def number(values: Mapping[str, Any], name: str) -> float:
    """A finite number; NaN where there is none."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def text(values: dict[str, Any], name: str, location: str, remedy: str) -> str:
    """A text that has to be there.

    Raises:
        ConfigError: it is not.
    """
    value = values.get(name)
    if not isinstance(value, str):
        raise ConfigError.at(location, f"has {name} = {value!r}, which is no text", remedy)
    return value


def _object(written: str, location: str, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(written)
    except ValueError as error:
        raise ConfigError.at(location, f"is no JSON: {error}", remedy) from None
    if not isinstance(value, dict):
        raise ConfigError.at(location, "is no JSON object", remedy)
    return value

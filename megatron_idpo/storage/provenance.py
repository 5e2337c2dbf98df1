"""Records of what a result was made from, and their comparison with the current inputs.

A record is a mapping of named parts to JSON values: settings, and sha256 digests of inputs that are
too large to store (weights, token ids). Mappings may be nested; part `b` in section `a` is named
`a.b`. The user of a stored result reads its record, calls `diff` with the current inputs, and
refuses to mix the two if a part differs:

    differences = diff(read_record(path, error=DataError, remedy="delete it"), current, _LABELS)
    if problems := as_problems(differences, str(path), "name another output directory"):
        raise DataError.of(problems)
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idpo.errors import CheckpointError, Problem, UserError
from megatron_idpo.storage.atomic import write_json


@dataclass(frozen=True, slots=True)
class Difference:
    """One part whose saved value is not the current one."""

    name: str
    """Of the part, with its sections: `sampling.seed`."""

    label: str
    """The part in words that the user knows."""

    saved: Any
    current: Any
    """None where the part is missing."""

    def __str__(self) -> str:
        """`evaluate.seed was 1, is now 2`; of a digest only that it differs."""
        if _is_digest(self.saved) or _is_digest(self.current):
            return f"{self.label} differs"
        return f"{self.label} was {_text(self.saved)}, is now {_text(self.current)}"


def diff(
    saved: Mapping[str, Any], current: Mapping[str, Any], labels: Mapping[str, str] | None = None
) -> list[Difference]:
    """Compares two records part by part.

    A missing part equals one that is None; a tuple equals the list that JSON makes of it.

    Args:
        saved: the record of the stored result.
        current: the record of the current inputs.
        labels: part name -> words for messages; a part without a label is called by its name.

    Returns:
        One entry per differing part: first in the order of `current`, then those only in `saved`.
    """
    labels = labels or {}
    before, now = _flat(saved), _flat(current)
    return [
        Difference(name, labels.get(name, name), before.get(name), now.get(name))
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]


def as_problems(differences: Sequence[Difference], location: str, remedy: str) -> list[Problem]:
    """The differences as problems of the saved result at `location`, each with the remedy."""
    return [Problem(location, str(difference), remedy) for difference in differences]


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read.
    """
    with CheckpointError.on_os_error(
        str(path), "cannot be read", "make it readable, or copy it again"
    ):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path, *, error: type[UserError], remedy: str) -> dict[str, Any]:
    """Reads a record, or any other JSON object.

    Args:
        path: of the file.
        error: the class to raise.
        remedy: what the user can do if the file is missing or damaged.

    Raises:
        UserError: of class `error`; the file cannot be read, or is not a JSON object.
    """
    with error.on_os_error(str(path), "cannot be read", remedy):
        content = path.read_bytes()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as reason:
        raise error.at(str(path), f"is not valid JSON: {reason}", remedy) from None
    if not isinstance(values, dict):
        raise error.at(str(path), "is not a JSON object", remedy)
    return values


def write_record(
    path: Path,
    values: Mapping[str, Any],
    *,
    error: type[UserError],
    remedy: str = "check that its directory exists",
    indent: int | None = 1,
) -> None:
    """Writes a record in one step: after a kill there is the old file or the new one.

    Raises:
        UserError: of class `error`; the file cannot be written.
    """
    with error.on_os_error(str(path), "cannot be written", remedy):
        write_json(path, dict(values), indent=indent)


def _flat(record: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    parts: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            parts |= _flat(value, f"{section}{name}.")
        else:
            # As JSON reads it back: tuples, also nested ones, become lists.
            parts[f"{section}{name}"] = json.loads(json.dumps(value))
    return parts


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _text(value: Any) -> str:
    return "not set" if value is None else str(value)

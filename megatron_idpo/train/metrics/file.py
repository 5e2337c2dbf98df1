"""`metrics.jsonl`: what was logged, one JSON object per line with `step` first.

Each line is handed to the system whole, so a kill loses at most the one being written; a half line
at the end is ignored by readers and cut off by the next run. A run that is resumed at a step drops
what was logged beyond it, so that no step is there twice. A number that JSON has not (NaN, an
infinity) is null.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_idpo.errors import ConfigError

type Record = dict[str, float]
"""`step`, `epoch` and metrics; NaN where the file has null."""

STEP = "step"


class MetricsFile:
    """A logger that appends to a metrics file."""

    def __init__(self, path: Path, *, resumed_step: int | None) -> None:
        """Open the file and cut off what is not of this run's past.

        Args:
            path: the file; its directory is made if need be.
            resumed_step: the last step that this run goes on from; None begins an empty file.

        Raises:
            ConfigError: it cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if resumed_step is None else list(_lines_until(path, resumed_step))
            # Renamed into place: a kill leaves the old file or the new one.
            fresh = path.with_name(f".{path.name}.incomplete")
            fresh.write_text("".join(kept), encoding="utf-8")
            os.replace(fresh, path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line.

        Raises:
            ConfigError: it cannot be written.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = f"{json.dumps({STEP: step, **finite}, allow_nan=False)}\n".encode()
        try:
            # Unbuffered: nothing that failed is tried again when the file is closed.
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """Everything logged, one record per step in ascending order.

    Lines of the same step are put together. What is no whole line of ours is passed over: the last
    one may still be being written.

    Raises:
        ConfigError: the file cannot be read.
    """
    records: dict[int, Record] = {}
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if (found := _parsed(line)) is not None:
                numbers = {
                    name: math.nan if value is None else float(value)
                    for name, value in found.items()
                    if value is None or isinstance(value, int | float)
                }
                records.setdefault(found[STEP], {}).update(numbers)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise ConfigError.at("training.output", message, "name the directory of a run") from None
    return [records[step] for step in sorted(records)]


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of steps up to this one; none if there is no file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _parsed(line)
        if found is not None and found[STEP] <= step:
            yield f"{line}\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """The object on a line, if it has a step."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get(STEP), int):
        return None
    return found


def _unwritable(path: Path, error: OSError) -> ConfigError:
    message = f"cannot write {path}: {error.strerror or error}"
    return ConfigError.at("training.output", message, "free space, or name a directory to write to")

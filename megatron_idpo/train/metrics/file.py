"""`metrics.jsonl`: the logged metrics, one JSON object per line with `step` first.

A kill loses at most the line being written. Readers ignore an incomplete line, and the next run
removes it; it reports lines that are damaged in another way. A resumed run drops lines beyond the
step it resumes from, so that no step is logged twice. NaN and infinity, which JSON does not have,
are written as null.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_idpo.errors import ConfigError
from megatron_idpo.storage.atomic import append_bytes, write_text
from megatron_idpo.train.callbacks import Callback

logger = logging.getLogger(__name__)

type Record = dict[str, float]
"""`step`, `epoch` and metrics; NaN where the file has null."""

STEP = "step"


class MetricsFile(Callback):
    """A logger that appends to a metrics file."""

    def __init__(self, path: Path, *, resumed_step: int | None) -> None:
        """Drop the lines that do not belong to this run's past.

        Args:
            path: the file; its directory is created if needed.
            resumed_step: last step of the checkpoint that the run resumes from; None starts an
                empty file.

        Raises:
            ConfigError: it cannot be written.
        """
        self._path = path
        with self._write_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = ""
            if resumed_step is not None and path.exists():
                lines = list(_complete_lines(path))
                kept = "".join(line for line, record in lines if record[STEP] <= resumed_step)
                num_damaged = path.read_bytes().count(b"\n") - len(lines)
                if num_damaged > 0:
                    logger.warning("%s: dropped %d damaged lines", path, num_damaged)
            write_text(path, kept)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line.

        Raises:
            ConfigError: it cannot be written.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = f"{json.dumps({STEP: step, **finite}, allow_nan=False)}\n".encode()
        with self._write_errors():
            # No fsync: it could stall training, and a resumed run rewrites the last lines anyway.
            append_bytes(self._path, line, fsync=False)

    def _write_errors(self) -> AbstractContextManager[None]:
        remedy = "check that its directory exists"
        return ConfigError.on_os_error("training.output", f"cannot write {self._path}", remedy)


def read_metrics(path: Path) -> list[Record]:
    """Read everything logged, one record per step in ascending order.

    Lines of the same step are merged. Lines that are not complete records are skipped: the last one
    may be in the middle of being written.

    Raises:
        ConfigError: the file cannot be read.
    """
    records: dict[int, Record] = {}
    remedy = "name the directory of a run"
    with ConfigError.on_os_error("training.output", f"cannot read {path}", remedy):
        parsed = list(_complete_lines(path))
    for _, record in parsed:
        values = {
            name: math.nan if value is None else float(value)
            for name, value in record.items()
            if value is None or isinstance(value, int | float)
        }
        records.setdefault(record[STEP], {}).update(values)
    return [records[step] for step in sorted(records)]


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line, with its line break, and its object; only lines of an object with a step."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            is_record = isinstance(record, dict) and isinstance(record.get(STEP), int)
            for value in record.values() if is_record else ():
                if isinstance(value, int):
                    float(value)  # as readers do; too large for one in a damaged line
        except (ValueError, OverflowError, RecursionError):
            continue
        if is_record:
            yield f"{line}\n", record

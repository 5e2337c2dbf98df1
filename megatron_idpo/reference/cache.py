"""Reference log-probabilities on disk: computed once, for every layer that is needed.

    DIR/
      reference.parquet    the training pairs in the dataset's order (logps_table.py)
      fingerprint.json     the inputs they depend on (fingerprint.py), and the table's checksum
      parts/               during scoring: the pairs scored so far
      eval/                the same for the held-out pairs

Scoring adds one part after another, each written atomically, so that a kill at any time costs only
the pairs since the last part. Pairs may be scored in another order than the dataset's. A part's
name has the position of its first pair in that order, and a checksum of the fingerprint, the order
and the content: a changed part, or one of another cache or order, is refused. At the end the parts
are merged into one table, in the dataset's order; `fingerprint.json`, a sealed file, is written
after it and marks it as complete. A cache is opened with the fingerprint that it must have; every
difference is an error that names the input.

Rank 0 writes and reads a cache. Nothing here is collective.

Shapes: P pairs, B pairs of a part, L layers, 2 = chosen, rejected.
"""

import re
import shutil
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.errors import CheckpointError
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.logps_table import (
    WRITE_REMEDY,
    Logps,
    damaged,
    encode_table,
    read_table,
    write_table,
)
from megatron_idpo.storage.checksums import CHANGED, Checksum, check_file, checksum
from megatron_idpo.storage.lock import locked_directory
from megatron_idpo.storage.sealed import read_sealed, seal_of, write_sealed

TABLE = "reference.parquet"
FINGERPRINT = "fingerprint.json"
EVAL = "eval"
_PARTS = "parts"
_CHECKSUM = "table_checksum"
_PART = re.compile(r"part-(\d{12})-([0-9a-f]{32})\.parquet")


def is_complete(directory: Path, required: Fingerprint) -> bool:
    """Whether there is a complete cache.

    Raises:
        CheckpointError: a cache, complete or not, was made from other inputs, naming every
            difference; or its fingerprint is damaged.
    """
    if (directory / FINGERPRINT).exists():
        _check(directory, _read_fingerprint(directory)[0], required)
        return True
    parts = directory / _PARTS
    if (parts / FINGERPRINT).exists():
        _check(parts, _read_fingerprint(parts)[0], required)
    elif (directory / TABLE).exists():
        raise damaged(directory / TABLE, f"there is no {FINGERPRINT} in its directory")
    return False


def read_fingerprint(directory: Path) -> Fingerprint | None:
    """The fingerprint of a complete cache; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not (directory / FINGERPRINT).exists():
        return None
    return _read_fingerprint(directory)[0]


def open_cache(directory: Path, required: Fingerprint) -> Logps:
    """Read the log-probabilities of a complete cache at the required layers: [P, L, 2].

    Raises:
        CheckpointError: there is none, it was made from other inputs, or it is damaged.
    """
    if not is_complete(directory, required):
        raise CheckpointError.at(str(directory), "no complete cache", "make it with score")
    fingerprint, expected = _read_fingerprint(directory)
    table = directory / TABLE
    check_file(table, expected, error=CheckpointError, remedy=f"delete {directory} to score again")
    logps_PL2 = read_table(table, fingerprint.layers, selected=required.layers)
    if len(logps_PL2) != required.pairs:
        raise damaged(table, f"it has {len(logps_PL2)} pairs, not {required.pairs}")
    return logps_PL2


@contextmanager
def lock_cache(directory: Path) -> Iterator[None]:
    """Create a cache's directory and exclude other writers until the end of the block.

    Raises:
        CheckpointError: it cannot be created.
        ConfigError: it cannot be locked, or another run writes it.
        OutputLockedError: likewise, and the lock is probably that of a lost process.
    """
    _make_directory(directory)
    with locked_directory(directory, "reference.cache"):
        yield


class CacheWriter:
    """Writes the cache of one set of pairs; on one process, which holds the lock."""

    def __init__(
        self, directory: Path, fingerprint: Fingerprint, order_P: NDArray[np.int64] | None = None
    ) -> None:
        """Continue after the existing parts.

        Args:
            directory: of the cache, or of its held-out pairs.
            fingerprint: of the cache.
            order_P: the pairs in the order in which they are added, a permutation, int [P]; None
                is the dataset's order.

        Raises:
            CheckpointError: existing parts were made from other inputs or are damaged; or it cannot
                be written.
        """
        self._directory = directory
        self._parts = directory / _PARTS
        self._fingerprint = fingerprint
        self._order_P = order_P
        self._done: list[Logps] = []
        self._pending: list[Logps] = []
        self.done_pairs = 0
        """Pairs in complete parts."""

        _make_directory(self._parts)
        if (self._parts / FINGERPRINT).exists():
            saved = _read_fingerprint(self._parts)[0]
            _check(self._parts, saved, fingerprint)
            if saved.layers != fingerprint.layers:
                message = f"is incomplete, with the layers {', '.join(map(str, saved.layers))}"
                remedy = (
                    "complete it with the objective.layers that it was begun with, or delete it"
                )
                raise CheckpointError.at(str(self._parts), message, remedy)
        else:
            self._write_fingerprint(self._parts)
        for path in sorted(self._parts.glob("part-*.parquet")):
            self._check_part(path)
            self._count(read_table(path, fingerprint.layers))
        if self.done_pairs > fingerprint.pairs:
            raise damaged(self._parts, f"{self.done_pairs} pairs of {fingerprint.pairs}")

    def add(self, logps_BL2: Logps) -> None:
        """Keep the log-probabilities of the next pairs in memory."""
        self._pending.append(logps_BL2)

    def write_part(self) -> None:
        """Write the pairs that were added since the last part.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not sum(map(len, self._pending)):
            return  # also for batches without a pair: a table without rows could not be read back
        logps_BL2 = np.concatenate(self._pending)
        content = encode_table(logps_BL2, self._fingerprint.layers, first=self.done_pairs)
        name = f"part-{self.done_pairs:012d}-{self._part_checksum(content)}.parquet"
        write_table(self._parts / name, content)
        self._pending = []
        self._count(logps_BL2)

    def finish(self) -> None:
        """Merge all parts into one table, and delete them.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.write_part()
        assert self.done_pairs == self._fingerprint.pairs, (self.done_pairs, self._fingerprint)
        table = self._directory / TABLE
        logps_PL2 = np.concatenate(self._done)
        if self._order_P is not None:
            logps_PL2 = logps_PL2[np.argsort(self._order_P)]
        content = encode_table(logps_PL2, self._fingerprint.layers)
        write_table(table, content)
        # Last: the fingerprint marks the table as complete.
        self._write_fingerprint(self._directory, {_CHECKSUM: checksum(content)})
        shutil.rmtree(self._parts, ignore_errors=True)

    def _count(self, logps_BL2: Logps) -> None:
        self._done.append(logps_BL2)
        self.done_pairs += len(logps_BL2)

    def _check_part(self, path: Path) -> None:
        """Checks that a part is the next one, unchanged, and of this cache."""
        remedy = f"delete {self._parts} to score again"
        name = _PART.fullmatch(path.name)
        if name is None or int(name[1]) != self.done_pairs:
            message = f"does not begin with pair {self.done_pairs:,}, which comes next"
            raise CheckpointError.at(str(path), message, remedy)
        with CheckpointError.on_os_error(str(path), "cannot be read", remedy):
            content = path.read_bytes()
        if self._part_checksum(content) != name[2]:
            message = f"{CHANGED}, or belongs to another cache or another data.seed"
            raise CheckpointError.at(str(path), message, remedy)

    def _part_checksum(self, content: Buffer) -> str:
        total = Checksum()
        total.update(seal_of(self._fingerprint.as_dict()).encode())
        if self._order_P is not None:
            total.update(self._order_P.tobytes())
        total.update(content)
        return total.text()

    def _write_fingerprint(self, directory: Path, more: dict[str, str] | None = None) -> None:
        values = {**self._fingerprint.as_dict(), **(more or {})}
        path = directory / FINGERPRINT
        write_sealed(path, values, remedy=WRITE_REMEDY)


def _make_directory(path: Path) -> None:
    with CheckpointError.on_os_error(str(path), "cannot be written", WRITE_REMEDY):
        path.mkdir(parents=True, exist_ok=True)


def _check(directory: Path, saved: Fingerprint, required: Fingerprint) -> None:
    mismatch = saved.mismatch(required)
    if mismatch:
        remedy = "set reference.cache to a new directory, or delete it to score again"
        raise CheckpointError.at(str(directory), f"cache {mismatch}", remedy)


def _read_fingerprint(directory: Path) -> tuple[Fingerprint, str]:
    """A cache's fingerprint, and its table's checksum, empty while the cache is incomplete.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / FINGERPRINT
    values = read_sealed(path, remedy=f"delete {directory} to score again")
    try:
        table = str(values.pop(_CHECKSUM, ""))
        return Fingerprint.from_dict(values), table
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from None

"""Reference log-probabilities on disk: computed once, for every layer that needs them.

    DIR/
      reference.parquet    the training pairs in the dataset's order (cache_files.py)
      fingerprint.json     what they depend on (fingerprint.py), and the table's sha256
      parts/               while scoring goes on: what is done so far
      eval/                the same of the held-out pairs

Scoring adds part after part, each complete or not there, so that a kill at any moment costs the
pairs since the last part. At the end the parts become one table; `fingerprint.json` is written
after it and says that it is complete. Nothing is reused that another model or other data made:
whoever opens a cache says what it has to be, and every part that differs is named.

One process writes a cache; every rank reads it. Nothing here is collective.

Shapes: P pairs, L layers, 2 = chosen, rejected.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_idpo.errors import CheckpointError
from megatron_idpo.reference.cache_files import (
    Logps,
    damaged,
    make_directory,
    read_table,
    write_json,
    write_table,
)
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.storage.lock import Held, locked

TABLE = "reference.parquet"
FINGERPRINT = "fingerprint.json"
EVAL = "eval"
_PARTS = "parts"
_SHA256 = "table_sha256"


@dataclass(frozen=True, slots=True)
class CachedLogps:
    """A table in memory."""

    layers: tuple[int, ...]
    """Ascending; the last is the final layer."""

    logps_PL2: Logps


def is_complete(directory: Path, wanted: Fingerprint) -> bool:
    """Whether there is a finished cache, which then is what is wanted.

    Raises:
        CheckpointError: there is one, or the beginning of one, of something else; naming every
            part that differs. Or its fingerprint is damaged.
    """
    if (directory / FINGERPRINT).exists():
        _check(directory, _read_fingerprint(directory)[0], wanted)
        return True
    parts = directory / _PARTS
    if (parts / FINGERPRINT).exists():
        _check(parts, _read_fingerprint(parts)[0], wanted)
    elif (directory / TABLE).exists():
        raise damaged(directory / TABLE, f"there is no {FINGERPRINT} beside it")
    return False


def open_cache(directory: Path, wanted: Fingerprint) -> CachedLogps:
    """Read a finished cache.

    Raises:
        CheckpointError: there is none, it is of something else, or it is damaged.
    """
    if not is_complete(directory, wanted):
        raise CheckpointError.at(str(directory), "is no finished cache", "make it by score")
    found, sha256 = _read_fingerprint(directory)
    table = directory / TABLE
    if _sha256(table) != sha256:
        raise damaged(table, f"it is not the file that {directory / FINGERPRINT} belongs to")
    logps_PL2 = read_table(table, found.layers, wanted=wanted.layers)
    if len(logps_PL2) != wanted.pairs:
        raise damaged(table, f"it has {len(logps_PL2)} pairs, not {wanted.pairs}")
    return CachedLogps(wanted.layers, logps_PL2)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make a cache's directory and keep other writers out; the system lets go when we end.

    Raises:
        CheckpointError: somebody else writes it, or it cannot be made.
    """
    make_directory(directory)
    with ExitStack() as hold:
        try:
            hold.enter_context(locked(directory / ".lock"))
        except Held:
            remedy = "wait for it, or name another directory in reference.cache"
            raise CheckpointError.at(str(directory), "is being written", remedy) from None
        except OSError as error:
            remedy = "name a directory on another file system in reference.cache"
            message = f"cannot be locked: {error.strerror}"
            raise CheckpointError.at(str(directory), message, remedy) from None
        yield


class CacheWriter:
    """The cache of one set of pairs while it is made; on one process, which holds it."""

    def __init__(self, directory: Path, fingerprint: Fingerprint) -> None:
        """Go on from the parts that are there.

        Args:
            directory: of the cache, or of its held-out pairs.
            fingerprint: what it is going to be.

        Raises:
            CheckpointError: what is there is of something else or damaged, or cannot be written.
        """
        self._directory = directory
        self._parts = directory / _PARTS
        self._fingerprint = fingerprint
        self._done: list[Logps] = []
        self._fresh: list[Logps] = []
        self.done_pairs = 0
        """Pairs in finished parts."""

        make_directory(self._parts)
        if (self._parts / FINGERPRINT).exists():
            found = _read_fingerprint(self._parts)[0]
            _check(self._parts, found, fingerprint)
            if found.layers != fingerprint.layers:
                message = f"is unfinished, with the layers {', '.join(map(str, found.layers))}"
                remedy = "finish it with the objective.layers that it began with, or delete it"
                raise CheckpointError.at(str(self._parts), message, remedy)
        else:
            write_json(self._parts / FINGERPRINT, fingerprint.as_dict())
        self._read_parts()

    def add(self, logps_BL2: Logps) -> None:
        """Keep the log-probabilities of the next pairs, in memory."""
        self._fresh.append(logps_BL2)

    def write_part(self) -> None:
        """Put on the disk what was added since the last part.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self._fresh:
            return
        logps_BL2 = np.concatenate(self._fresh)
        path = self._part(self.done_pairs)
        write_table(path, logps_BL2, self._fingerprint.layers, first=self.done_pairs)
        self._fresh = []
        self._take(logps_BL2)

    def finish(self) -> None:
        """Make one table of all parts, and take them away.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.write_part()
        assert self.done_pairs == self._fingerprint.pairs, (self.done_pairs, self._fingerprint)
        table = self._directory / TABLE
        write_table(table, np.concatenate(self._done), self._fingerprint.layers)
        message = {**self._fingerprint.as_dict(), _SHA256: _sha256(table)}
        write_json(self._directory / FINGERPRINT, message)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _read_parts(self) -> None:
        for path in sorted(self._parts.glob("part-*.parquet")):
            if path != self._part(self.done_pairs):
                raise damaged(path, f"{self._part(self.done_pairs).name} should come before it")
            self._take(read_table(path, self._fingerprint.layers))
        if self.done_pairs > self._fingerprint.pairs:
            raise damaged(self._parts, f"{self.done_pairs} pairs of {self._fingerprint.pairs}")

    def _take(self, logps_BL2: Logps) -> None:
        self._done.append(logps_BL2)
        self.done_pairs += len(logps_BL2)

    def _part(self, first: int) -> Path:
        return self._parts / f"part-{first:012d}.parquet"


def _check(directory: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    differences = found.differences(wanted)
    if differences:
        raise CheckpointError.at(
            str(directory),
            f"is the cache of another reference: {'; '.join(differences)}",
            "name another directory in reference.cache, or delete this one to score again",
        )


def _read_fingerprint(directory: Path) -> tuple[Fingerprint, str]:
    """The fingerprint of a finished cache and its table's sha256; of parts without the latter."""
    path = directory / FINGERPRINT
    try:
        values = json.loads(path.read_text("utf-8"))
        sha256 = str(values.pop(_SHA256, ""))
        return Fingerprint.from_dict(values), sha256
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise damaged(path, error) from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error) from None

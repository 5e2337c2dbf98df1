"""Token stores: the tokenized pairs of one source, written once as a stream, read memory-mapped.

A store is a directory: `pairs.arrow` (an Arrow stream that `datasets.Dataset.from_file` also
opens), `lengths.i32` (int32 [P, 3], so that planning does not read tokens), `bad_rows.jsonl` and,
written last, `meta.json`; without it the store is incomplete. Memory does not grow with the number
of pairs: batches are written as they arrive, and reading maps the files. The directory's name
determines whether a store may be reused (`build_store.py`).

`meta.json` is sealed. It has the directory's name and the checksums of `lengths.i32`, of
`bad_rows.jsonl` and of every record batch of `pairs.arrow`, computed while writing. A process
compares them when it first reads the file or the batch, so nothing damaged is parsed, and a batch
that no pair is read from is not read for its checksum either.

Shapes: P pairs; B pairs of one batch; 3 = prompt, chosen, rejected.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.report import DataReport
from megatron_idpo.errors import DataError
from megatron_idpo.storage.checksums import CHANGED, Checksum, check_file, checksum
from megatron_idpo.storage.sealed import read_sealed, write_sealed

type Tokens = NDArray[np.int32]

COLUMNS = ("prompt", "chosen", "rejected")

_META, _PAIRS, _LENGTHS, _BAD_ROWS = "meta.json", "pairs.arrow", "lengths.i32", "bad_rows.jsonl"

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""What ends an Arrow stream."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not a pair."""

    part: int
    """Which part of its source."""

    row: int
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized rows of one part, in order."""

    pairs: Any
    """A `pyarrow.RecordBatch` of the kept pairs, with the columns of `pairs.arrow`."""

    bad_rows: tuple[BadRow, ...]
    report: DataReport


def arrow_schema() -> Any:
    """The `pyarrow.Schema` of `pairs.arrow`."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    return pa.schema({**dict.fromkeys(COLUMNS, tokens), "part": pa.int32(), "row": pa.int64()})


def token_columns(batch: Any) -> list[tuple[Tokens, Tokens]]:
    """Offsets and values of prompts, chosen and rejected of a record batch, as views."""
    columns = batch.columns[: len(COLUMNS)]
    return [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]


class PairStoreWriter:
    """Writes a store into an empty directory; complete after `finish`."""

    def __init__(self, directory: Path, name: str) -> None:
        """Args: an existing, empty directory, and the name that it is going to have."""
        self._directory, self._name = directory, name
        self._files = ExitStack()
        self._arrow = self._files.enter_context((directory / _PAIRS).open("wb"))
        self._lengths, self._bad_rows = (
            self._files.enter_context(_CheckedFile(directory / file))
            for file in (_LENGTHS, _BAD_ROWS)
        )
        schema = arrow_schema().serialize()
        self._arrow.write(schema)
        self._frame = Checksum()  # of what is before and after the batches
        self._frame.update(schema)
        # Pairs, first byte, bytes and checksum of each record batch.
        self._batches: list[tuple[int, int, int, str]] = []
        self._contents = hashlib.sha256()
        self._highest_token = -1
        self.report = DataReport()

    def append(self, batch: TokenBatch) -> None:
        """Write a batch's pairs and bad rows."""
        self.report.add(batch.report)
        for bad in batch.bad_rows:
            line = json.dumps([bad.part, bad.row, bad.reason, bad.remedy])
            self._bad_rows.write(f"{line}\n".encode())
        if not batch.pairs.num_rows:
            return
        message, start = batch.pairs.serialize(), self._arrow.tell()
        self._arrow.write(message)
        self._batches.append((batch.pairs.num_rows, start, message.size, checksum(message)))
        columns = token_columns(batch.pairs)
        highest = max(int(tokens.max()) for _, tokens in columns)
        self._highest_token = max(self._highest_token, highest)
        lengths_B3 = np.column_stack([np.diff(offsets) for offsets, _ in columns])
        self._lengths.write(lengths_B3.astype(np.int32, copy=False).tobytes())
        # Pair by pair, so that the fingerprint is independent of the batch size.
        for at, lengths in enumerate(lengths_B3):
            self._contents.update(lengths.astype("<i4").tobytes())
            for offsets, tokens in columns:
                piece = tokens[offsets[at] : offsets[at + 1]]
                self._contents.update(piece.astype("<i4", copy=False).tobytes())

    def finish(self) -> None:
        """Close the files and write `meta.json`: the store is complete.

        Raises:
            OSError: a file cannot be written.
        """
        self._arrow.write(_END_OF_STREAM)
        self._frame.update(_END_OF_STREAM)
        num_bytes = self._arrow.tell()
        self._files.close()
        meta = {
            "name": self._name,
            "pairs": self.report.kept_pairs,
            "fingerprint": self._contents.hexdigest(),
            "highest_token": self._highest_token,
            "sizes_bytes": {
                _PAIRS: num_bytes,
                _LENGTHS: self._lengths.num_bytes,
                _BAD_ROWS: self._bad_rows.num_bytes,
            },
            "checksums": {
                _PAIRS: self._frame.text(),
                _LENGTHS: self._lengths.checksum.text(),
                _BAD_ROWS: self._bad_rows.checksum.text(),
            },
            "batches": self._batches,
            "report": asdict(self.report),
        }
        # On one line: with indentation, Python's slow encoder would write a line per number.
        write_sealed(self._directory / _META, meta, indent=None, error=DataError)

    def close(self) -> None:
        """Close the files of a store that cannot be finished; the first error counts."""
        with suppress(OSError):
            self._files.close()


class _CheckedFile:
    """A file that is written from its beginning, with the checksum of its content."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.num_bytes = 0
        self.checksum = Checksum()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        """Append the content."""
        self.num_bytes += self._file.write(content)
        self.checksum.update(content)


class _MappedBatch(NamedTuple):
    """The columns of a record batch, as views of the file."""

    tokens: list[tuple[Tokens, Tokens]]
    """Offsets and values of prompts, chosen and rejected."""

    part_B: NDArray[np.int32]
    row_B: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Any) -> "_MappedBatch":
        *_, part, row = batch.columns
        return cls(token_columns(batch), part.to_numpy(), row.to_numpy())


class PairStore:
    """A complete store, read-only and memory-mapped; picklable (files are opened when needed).

    Its methods raise `DataError` at the first read of something that has changed.
    """

    def __init__(self, directory: Path) -> None:
        """Open a store.

        Raises:
            DataError: `meta.json` is missing or has changed, the directory has been renamed, or a
                file is missing or has another size.
        """
        self._directory = directory
        meta = self._meta
        if meta["name"] != directory.name:
            raise self._damaged(f"were written as {meta['name']}")
        for name, size in meta["sizes_bytes"].items():
            path = directory / name
            with DataError.on_os_error(str(path), "cannot be read", self._remedy):
                found = path.stat().st_size
            if found != size:
                message = f"has {found:,} bytes instead of {size:,}"
                raise DataError.at(str(path), message, self._remedy)
        self.num_pairs = int(meta["pairs"])
        self.fingerprint = str(meta["fingerprint"])
        self.highest_token = int(meta["highest_token"])
        self.report = DataReport(**meta["report"])

    @cached_property
    def lengths_P3(self) -> Tokens:
        """int32 [P, 3]: tokens in prompt, chosen and rejected; memory-mapped."""
        path, shape = self._checked(_LENGTHS), (self.num_pairs, 3)
        if not self.num_pairs:  # an empty file cannot be mapped
            return np.empty(shape, np.int32)
        return np.memmap(path, np.int32, "r", shape=shape)

    def tokens(self, index: int) -> tuple[Tokens, Tokens, Tokens]:
        """Prompt, chosen and rejected of a pair, 0 <= index < P: read-only views of the file."""
        batch, at = self._locate(index)
        prompt, chosen, rejected = (
            values[offsets[at] : offsets[at + 1]] for offsets, values in batch.tokens
        )
        return prompt, chosen, rejected

    def source_row(self, index: int) -> tuple[int, int]:
        """Part and row number that a pair was read from."""
        batch, at = self._locate(index)
        return int(batch.part_B[at]), int(batch.row_B[at])

    def bad_rows(self) -> Iterator[BadRow]:
        """The rows that are not pairs, in order."""
        with self._checked(_BAD_ROWS).open(encoding="utf-8") as file:
            for line in file:
                yield BadRow(*json.loads(line))

    @cached_property
    def _meta(self) -> dict[str, Any]:
        path = self._directory / _META
        return read_sealed(path, remedy=self._remedy, indent=None, error=DataError)

    @cached_property
    def _file(self) -> Any:
        """The mapped `pairs.arrow`, a `pyarrow.Buffer`."""
        import pyarrow as pa

        path = self._directory / _PAIRS
        with DataError.on_os_error(str(path), "cannot be read", self._remedy):
            content = pa.memory_map(str(path)).read_buffer()
        batches, frame = self._meta["batches"], Checksum()
        first, stop = (batches[0][1], sum(batches[-1][1:3])) if batches else (content.size,) * 2
        frame.update(content.slice(0, first))
        frame.update(content.slice(stop))
        if frame.text() != self._meta["checksums"][_PAIRS]:
            raise DataError.at(str(path), CHANGED, self._remedy)
        return content

    @cached_property
    def _starts(self) -> list[int]:
        """The index of the first pair of each record batch."""
        sizes = np.array([size for size, *_ in self._meta["batches"]], np.int64)
        return (np.cumsum(sizes) - sizes).tolist()  # type: ignore[no-any-return]

    @cached_property
    def _batches(self) -> dict[int, _MappedBatch]:
        """The record batches that have been read and found unchanged, by index."""
        return {}

    def _locate(self, index: int) -> tuple[_MappedBatch, int]:
        batch = bisect_right(self._starts, index) - 1
        if batch not in self._batches:  # two threads may both read it, with the same result
            self._batches[batch] = self._read_batch(batch)
        return self._batches[batch], index - self._starts[batch]

    def _read_batch(self, index: int) -> _MappedBatch:
        import pyarrow as pa

        size, start, num_bytes, expected = self._meta["batches"][index]
        message = self._file.slice(start, num_bytes)
        if checksum(message) != expected:
            first = self._starts[index]
            pairs = f"pairs {first:,} to {first + size - 1:,}"
            raise DataError.at(
                str(self._directory / _PAIRS), f"{CHANGED} (in {pairs})", self._remedy
            )
        return _MappedBatch.of(pa.ipc.read_record_batch(message, arrow_schema()))

    def _checked(self, name: str) -> Path:
        """The path of a file whose content is the one that was written."""
        path = self._directory / name
        check_file(path, self._meta["checksums"][name], error=DataError, remedy=self._remedy)
        return path

    @property
    def _remedy(self) -> str:
        return f"delete {self._directory} to tokenize the pairs again"

    def _damaged(self, message: str) -> DataError:
        return DataError.at(str(self._directory), f"the tokenized pairs {message}", self._remedy)

    def __getstate__(self) -> dict[str, Any]:
        """Everything that is not read again from the files."""
        cached = ("lengths_P3", "_meta", "_file", "_starts", "_batches")
        return {name: value for name, value in vars(self).items() if name not in cached}

"""Token stores: the tokenized pairs of one source, written once as a stream, read memory-mapped.

A store is a directory: `pairs.arrow` (an Arrow stream that `datasets.Dataset.from_file` also
opens), `lengths.i32` (int32 [P, 3], so that planning does not read tokens), `bad_rows.jsonl` and,
written last, `meta.json`; without it the store is incomplete. Memory does not grow with the number
of pairs: batches are written as they arrive, and reading maps the files. The directory's name
determines whether a store may be reused (`build_store.py`).

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.report import DataReport
from megatron_idpo.errors import DataError

type Tokens = NDArray[np.int32]

COLUMNS = ("prompt", "chosen", "rejected")


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

    def __init__(self, directory: Path) -> None:
        """Args: an existing, empty directory."""
        import pyarrow as pa

        self._directory = directory
        self._files = ExitStack()
        sink = self._files.enter_context(pa.OSFile(str(directory / "pairs.arrow"), "wb"))
        self._arrow = self._files.enter_context(pa.ipc.new_stream(sink, arrow_schema()))
        self._lengths = self._files.enter_context((directory / "lengths.i32").open("wb"))
        bad_rows = (directory / "bad_rows.jsonl").open("w", encoding="utf-8")
        self._bad_rows = self._files.enter_context(bad_rows)
        self._contents = hashlib.sha256()
        self._highest_token = -1
        self.report = DataReport()

    def append(self, batch: TokenBatch) -> None:
        """Write a batch's pairs and bad rows."""
        self.report.add(batch.report)
        for bad in batch.bad_rows:
            line = json.dumps([bad.part, bad.row, bad.reason, bad.remedy])
            self._bad_rows.write(line + "\n")
        if not batch.pairs.num_rows:
            return
        self._arrow.write_batch(batch.pairs)
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
        """Close the files and write `meta.json`: the store is complete."""
        self._files.close()
        sizes = {name: (self._directory / name).stat().st_size for name in _DATA_FILES}
        meta = {
            "pairs": self.report.kept_pairs,
            "fingerprint": self._contents.hexdigest(),
            "highest_token": self._highest_token,
            "sizes_bytes": sizes,
            "report": asdict(self.report),
        }
        (self._directory / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")

    def close(self) -> None:
        """Close the files of a store that cannot be finished; the first error counts."""
        with suppress(OSError):
            self._files.close()


_DATA_FILES = ("pairs.arrow", "lengths.i32", "bad_rows.jsonl")


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
    """A complete store, read-only and memory-mapped; picklable (files are opened when needed)."""

    def __init__(self, directory: Path) -> None:
        """Open a store.

        Raises:
            DataError: a file is missing or its size has changed since it was written.
        """
        self._directory = directory
        try:
            meta = json.loads((directory / "meta.json").read_text("utf-8"))
            for name, size in meta["sizes_bytes"].items():
                if (directory / name).stat().st_size != size:
                    raise ValueError(f"{name} should have {size} bytes")
        except (OSError, ValueError, KeyError) as error:
            raise DataError.at(
                str(directory), f"the tokenized pairs are damaged: {error}", "delete the directory"
            ) from None
        self.num_pairs = int(meta["pairs"])
        self.fingerprint = str(meta["fingerprint"])
        self.highest_token = int(meta["highest_token"])
        self.report = DataReport(**meta["report"])

    @cached_property
    def lengths_P3(self) -> Tokens:
        """int32 [P, 3]: tokens in prompt, chosen and rejected; memory-mapped."""
        shape = (self.num_pairs, 3)
        return np.memmap(self._directory / "lengths.i32", np.int32, "r", shape=shape)

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
        with (self._directory / "bad_rows.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield BadRow(*json.loads(line))

    @cached_property
    def _batches(self) -> tuple[list[_MappedBatch], list[int]]:
        """The record batches, and the index of the first pair in each."""
        import pyarrow as pa

        with pa.ipc.open_stream(pa.memory_map(str(self._directory / "pairs.arrow"))) as stream:
            batches = [_MappedBatch.of(record_batch) for record_batch in stream]
        sizes = np.array([len(batch.row_B) for batch in batches], np.int64)
        return batches, (np.cumsum(sizes) - sizes).tolist()

    def _locate(self, index: int) -> tuple[_MappedBatch, int]:
        batches, starts = self._batches
        batch = bisect_right(starts, index) - 1
        return batches[batch], index - starts[batch]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory maps."""
        mapped = ("lengths_P3", "_batches")
        return {name: value for name, value in vars(self).items() if name not in mapped}

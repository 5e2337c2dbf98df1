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
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

    part: int
    rows_B: NDArray[np.int64]
    """Row numbers of the kept pairs."""

    lengths_B3: Tokens
    tokens: tuple[Tokens, Tokens, Tokens]
    """All prompts concatenated, all chosen, all rejected."""

    bad_rows: tuple[BadRow, ...]
    report: DataReport


class PairStoreWriter:
    """Writes a store into an empty directory; complete after `close` and `finish`."""

    def __init__(self, directory: Path) -> None:
        """Args: an existing, empty directory."""
        import pyarrow as pa

        self._pa = pa
        tokens = pa.list_(pa.int32())
        fields = {**dict.fromkeys(COLUMNS, tokens), "part": pa.int32(), "row": pa.int64()}
        self._schema = pa.schema(fields)
        self._directory = directory
        self._sink = pa.OSFile(str(directory / "pairs.arrow"), "wb")
        self._arrow = pa.ipc.new_stream(self._sink, self._schema)
        self._lengths = (directory / "lengths.i32").open("wb")
        self._bad_rows = (directory / "bad_rows.jsonl").open("w", encoding="utf-8")
        self._contents = hashlib.sha256()
        self._highest_token = -1
        self.report = DataReport()

    def append(self, batch: TokenBatch) -> None:
        """Write a batch's pairs and bad rows."""
        self.report.add(batch.report)
        for bad in batch.bad_rows:
            line = json.dumps([bad.part, bad.row, bad.reason, bad.remedy])
            self._bad_rows.write(line + "\n")
        if not len(batch.rows_B):
            return
        pa = self._pa
        ends_B3 = np.cumsum(batch.lengths_B3, axis=0, dtype=np.int32)
        arrays = []
        for column, tokens in enumerate(batch.tokens):
            offsets = np.concatenate([np.zeros(1, np.int32), ends_B3[:, column]])
            arrays.append(pa.ListArray.from_arrays(offsets, tokens))
            self._highest_token = max(self._highest_token, int(tokens.max()))
        part = np.full(len(batch.rows_B), batch.part, np.int32)
        arrays += [pa.array(part), pa.array(batch.rows_B)]
        self._arrow.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._lengths.write(batch.lengths_B3.tobytes())
        self._hash_pairs(batch, ends_B3)

    def finish(self) -> None:
        """Write `meta.json`, after the files are closed."""
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
        """Close the files; also after an error."""
        self._arrow.close()
        self._sink.close()
        self._lengths.close()
        self._bad_rows.close()

    def _hash_pairs(self, batch: TokenBatch, ends_B3: Tokens) -> None:
        """Hash pair by pair, so that the fingerprint is independent of the batch size."""
        starts_B3 = ends_B3 - batch.lengths_B3
        for at, lengths in enumerate(batch.lengths_B3):
            self._contents.update(lengths.astype("<i4").tobytes())
            for column, tokens in enumerate(batch.tokens):
                piece = tokens[starts_B3[at, column] : ends_B3[at, column]]
                self._contents.update(piece.astype("<i4", copy=False).tobytes())


_DATA_FILES = ("pairs.arrow", "lengths.i32", "bad_rows.jsonl")


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
        columns = self._views(batch)
        prompt, chosen, rejected = (
            values[offsets[at] : offsets[at + 1]] for offsets, values in columns
        )
        return prompt, chosen, rejected

    def source_row(self, index: int) -> tuple[int, int]:
        """Part and row number that a pair was read from."""
        batch, at = self._locate(index)
        record = self._batches[0][batch]
        return record.column(3)[at].as_py(), record.column(4)[at].as_py()

    def bad_rows(self) -> Iterator[BadRow]:
        """The rows that are not pairs, in order."""
        with (self._directory / "bad_rows.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield BadRow(*json.loads(line))

    @cached_property
    def _batches(self) -> tuple[list[Any], list[int]]:
        """Memory-mapped record batches, and the index of the first pair in each."""
        import pyarrow as pa

        with pa.ipc.open_stream(pa.memory_map(str(self._directory / "pairs.arrow"))) as stream:
            batches = list(stream)
        sizes = np.array([batch.num_rows for batch in batches], np.int64)
        return batches, (np.cumsum(sizes) - sizes).tolist()

    @cached_property
    def _columns(self) -> dict[int, list[tuple[Tokens, Tokens]]]:
        return {}

    def _views(self, batch: int) -> list[tuple[Tokens, Tokens]]:
        """Offsets and values of the three columns of a record batch, as views of the file."""
        if batch not in self._columns:
            columns = (self._batches[0][batch].column(part) for part in range(3))
            self._columns[batch] = [(c.offsets.to_numpy(), c.values.to_numpy()) for c in columns]
        return self._columns[batch]

    def _locate(self, index: int) -> tuple[int, int]:
        batch = bisect_right(self._batches[1], index) - 1
        return batch, index - self._batches[1][batch]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory maps."""
        mapped = ("lengths_P3", "_batches", "_columns")
        return {name: value for name, value in vars(self).items() if name not in mapped}

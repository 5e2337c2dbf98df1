"""Token stores: what is written is read, and damage is noticed."""

import pickle
from contextlib import closing
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from megatron_idpo.data.report import DataReport
from megatron_idpo.data.tokenize.store import (
    COLUMNS,
    BadRow,
    PairStore,
    PairStoreWriter,
    TokenBatch,
    arrow_schema,
)
from megatron_idpo.errors import DataError

PAIRS = [([1], [2, 3], [4]), ([5, 6], [7], [8, 9]), ([10], [11], [12])]


OTHER_SPLIT = [([1, 2], [3], [4])]
"""The tokens of `PAIRS[:1]`, split elsewhere."""


def batch(pairs: list[tuple[list[int], ...]], first_row: int) -> TokenBatch:
    records = [
        {**dict(zip(COLUMNS, pair, strict=True)), "part": 0, "row": row}
        for row, pair in enumerate(pairs, first_row)
    ]
    return TokenBatch(
        pairs=pa.RecordBatch.from_pylist(records, arrow_schema()),
        bad_rows=(BadRow(0, 9, "why", "remedy"),),
        report=DataReport(kept_pairs=len(pairs), skipped_rows=1),
    )


def write(directory: Path, *sizes: int, pairs: list[tuple[list[int], ...]] = PAIRS) -> PairStore:
    directory.mkdir()
    with closing(PairStoreWriter(directory)) as writer:
        first = 0
        for size in sizes:
            writer.append(batch(pairs[first : first + size], first + 1))
            first += size
        writer.finish()
    return PairStore(directory)


def test_pairs_are_read_back_with_lengths_and_rows(tmp_path: Path) -> None:
    store = write(tmp_path / "a", 2, 1)
    assert store.num_pairs == 3 and store.highest_token == 12
    assert [tuple(part.tolist() for part in store.tokens(i)) for i in range(3)] == PAIRS
    assert store.tokens(1)[0].dtype == np.int32 and not store.tokens(1)[0].flags.writeable
    assert store.lengths_P3.tolist() == [[1, 2, 1], [2, 1, 2], [1, 1, 1]]
    assert [store.source_row(i) for i in range(3)] == [(0, 1), (0, 2), (0, 3)]
    assert list(store.bad_rows()) == [BadRow(0, 9, "why", "remedy")] * 2
    assert store.report.kept_pairs == 3


def test_fingerprint_depends_on_tokens_not_on_batches(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 2, 1).fingerprint
    assert write(tmp_path / "b", 1, 1, 1).fingerprint == first
    assert write(tmp_path / "c", 2).fingerprint != first
    one, other = write(tmp_path / "d", 1), write(tmp_path / "e", 1, pairs=OTHER_SPLIT)
    assert one.fingerprint != other.fingerprint


def test_datasets_can_open_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    opened = datasets.Dataset.from_file(str(tmp_path / "a" / "pairs.arrow"))
    assert opened[1] == {"prompt": [5, 6], "chosen": [7], "rejected": [8, 9], "part": 0, "row": 2}


def test_store_can_be_pickled(tmp_path: Path) -> None:
    store = write(tmp_path / "a", 3)
    store.tokens(0), store.lengths_P3
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    assert pickle.loads(sent).tokens(2)[1].tolist() == [11]


@pytest.mark.parametrize("name", ["pairs.arrow", "lengths.i32", "meta.json"])
def test_damaged_store_is_reported(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"damaged.*delete the directory"):
        PairStore(tmp_path / "a")

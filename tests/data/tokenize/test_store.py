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
    with closing(PairStoreWriter(directory, directory.name)) as writer:
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


def read_everything(directory: Path) -> None:
    store = PairStore(directory)
    for index in range(store.num_pairs):
        store.tokens(index), store.source_row(index)
    store.lengths_P3, list(store.bad_rows())


def refused(directory: Path, name: str) -> None:
    """Asserts that the damage is found in this file, with a remedy, before anything is parsed."""
    with pytest.raises(DataError) as error:
        read_everything(directory)
    (problem,) = error.value.problems
    assert problem.location == str(directory / name)
    assert problem.remedy == f"delete {directory} to tokenize the pairs again"


@pytest.mark.parametrize("name", ["pairs.arrow", "lengths.i32", "bad_rows.jsonl", "meta.json"])
@pytest.mark.parametrize("kind", ["cut", "gone", "longer"])
def test_damaged_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    file = tmp_path / "a" / name
    content = file.read_bytes()
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-8] if kind == "cut" else content + content[-8:])
    refused(tmp_path / "a", name)


@pytest.mark.parametrize("name", ["pairs.arrow", "lengths.i32", "bad_rows.jsonl", "meta.json"])
def test_flipped_bits_are_refused_where_they_are_read(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 2, 1)
    file = tmp_path / "a" / name
    whole = file.read_bytes()
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        refused(tmp_path / "a", name)


def test_pairs_of_intact_batches_are_read(tmp_path: Path) -> None:
    """A batch is compared when a pair of it is read, and only that batch."""
    write(tmp_path / "a", 2, 1)
    file = tmp_path / "a" / "pairs.arrow"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    store = PairStore(tmp_path / "a")
    assert store.tokens(1)[1].tolist() == [7]
    with pytest.raises(DataError, match=r"has been changed .* \(in pairs 2 to 2\)"):
        store.tokens(2)


@pytest.mark.parametrize("name", ["pairs.arrow", "meta.json"])
def test_file_of_another_store_is_refused(name: str, tmp_path: Path) -> None:
    """Its pairs have the same lengths."""
    other = [([1], [2, 3], [9]), *PAIRS[1:]]
    for directory, pairs in (("a", PAIRS), ("b", other)):
        write(tmp_path / directory, 3, pairs=pairs)
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(DataError, match=r"delete .*/a to tokenize the pairs again"):
        read_everything(tmp_path / "a")


def test_renamed_store_is_refused(tmp_path: Path) -> None:
    """The name stands for the inputs; another name would be that of other inputs."""
    write(tmp_path / "a", 3)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(DataError, match="/b: the tokenized pairs were written as a; delete"):
        PairStore(tmp_path / "b")

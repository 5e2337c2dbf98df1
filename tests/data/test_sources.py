"""Finding what a source names."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_idpo.data.sources.open import Source, open_source
from megatron_idpo.errors import DataError

TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def rows_of(path: str, **fields: Any) -> list[tuple[str, int]]:
    found = open_source(Source(path=path, **fields))
    return [(Path(part.name).name, raw.row) for part in found.parts for raw in part.read()]


def test_a_file_a_pattern_and_a_directory(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    one = write_jsonl([TEXT, TEXT], "b.jsonl")
    write_jsonl([TEXT], "a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "more").mkdir()
    write_jsonl([TEXT], "more/c.jsonl")
    assert rows_of(one) == [("b.jsonl", 1), ("b.jsonl", 2)]
    files = [("a.jsonl", 1), ("b.jsonl", 1), ("b.jsonl", 2)]
    assert rows_of(str(tmp_path / "*.jsonl")) == files
    assert rows_of(str(tmp_path)) == rows_of(str(tmp_path / "[abm]*")) == [*files, ("c.jsonl", 1)]


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([TEXT, TEXT, TEXT])
    dataset.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": dataset, "held": dataset.select([0])})
    splits.save_to_disk(tmp_path / "two")
    assert rows_of(str(tmp_path / "one")) == [("one", row) for row in (1, 2, 3)]
    assert rows_of(str(tmp_path / "two"), split="held") == [("two", 1)]
    with pytest.raises(DataError, match="no split 'test'; it has train, held"):
        open_source(Source(path=str(tmp_path / "two"), split="test"))
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="the saved dataset cannot be read"):
        open_source(Source(path=str(tmp_path / "one")))


def test_the_digest_is_of_contents(write_jsonl: Callable[..., str]) -> None:
    def digest(path: str) -> str:
        return open_source(Source(path=path)).digest()

    first = digest(write_jsonl([TEXT], "a.jsonl"))
    assert digest(write_jsonl([TEXT], "b.jsonl")) == first
    assert digest(write_jsonl([TEXT], "a.json")) != first, "is read in another way"
    named = Source(path=write_jsonl([TEXT], "a.jsonl"), columns={"chosen": "rejected"})
    assert open_source(named).digest() != first
    assert digest(write_jsonl([{**TEXT, "chosen": "c"}], "a.jsonl")) != first


OTHERS = {"question": "q", "best": "a", "worst": "b", "chosen": "no answer", "system": "s"}
COLUMNS = {"prompt": "question", "chosen": "best", "rejected": "worst"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ""])
def test_columns_of_other_names(tmp_path: Path, suffix: str) -> None:
    """Whatever they are stored in; ours of the same names are not read, nor are unnamed ones."""
    path = tmp_path / f"data{suffix}"
    dataset = datasets.Dataset.from_list([OTHERS])
    if suffix == ".arrow":
        dataset.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif suffix == "":
        dataset.save_to_disk(path)
    elif suffix.startswith(".json"):
        path.write_text(json.dumps(OTHERS))
    else:
        {".csv": dataset.to_csv, ".parquet": dataset.to_parquet}[suffix](path)
    read = {}
    for name, columns in (
        ("ours", {}),
        ("named", COLUMNS),
        ("all", {**COLUMNS, "system": "system"}),
    ):
        [part] = open_source(Source(path=str(path), columns=columns)).parts
        [raw] = part.read()
        read[name] = pickle.loads(pickle.dumps(raw)).record()
    assert read["ours"] == {"question": "q", "chosen": "no answer"}
    assert read["named"] == TEXT
    assert read["all"] == {**TEXT, "system": "s"}


def test_a_file_that_may_not_be_read_is_reported(write_jsonl: Callable[..., str]) -> None:
    found = open_source(Source(path=write_jsonl([TEXT])))
    Path(found.parts[0].name).unlink()
    with pytest.raises(DataError, match="the file cannot be read: "):
        found.digest()


def test_a_hub_dataset_is_read_by_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, subset: str | None, split: str, **_: object) -> datasets.Dataset:
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([TEXT])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = open_source(Source(path="owner/pairs", split="train[:5]", subset="en"))
    assert found.parts[0].name == "owner/pairs:en:train[:5]"
    assert [raw.record() for raw in found.parts[0].read()] == [TEXT]
    assert asked == [("owner/pairs", "en", "train[:5]")]
    assert found.digest() != open_source(Source(path="owner/pairs")).digest()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file or directory"),
        ("./missing", "no such file or directory"),
        ("none/*.parquet", "no such file or directory"),
        ("owner/none", "the hub gives no split 'train' of it: gone"),
        ("{tmp}", "the directory holds no data file"),
    ],
)
def test_what_is_not_there_is_reported(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as error:
        open_source(Source(path=path.format(tmp=tmp_path)))
    assert message in str(error.value)

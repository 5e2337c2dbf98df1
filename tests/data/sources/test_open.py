"""Opening sources: files, patterns, directories, saved datasets, the hub."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.errors import DataError

TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def rows_of(path: str, **fields: Any) -> list[tuple[str, int]]:
    source = open_source(SourceConfig(path=path, **fields))
    return [(Path(part.name).name, raw.row) for part in source.parts for raw in part.read()]


def test_file_pattern_and_directory(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    one = write_jsonl([TEXT, TEXT], "b.jsonl")
    write_jsonl([TEXT], "a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "more").mkdir()
    write_jsonl([TEXT], "more/c.jsonl")
    assert rows_of(one) == [("b.jsonl", 1), ("b.jsonl", 2)]
    files = [("a.jsonl", 1), ("b.jsonl", 1), ("b.jsonl", 2)]
    assert rows_of(str(tmp_path / "*.jsonl")) == files
    assert rows_of(str(tmp_path)) == rows_of(str(tmp_path / "[abm]*")) == [*files, ("c.jsonl", 1)]


def test_saved_dataset_with_and_without_splits(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([TEXT, TEXT, TEXT])
    dataset.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": dataset, "held": dataset.select([0])})
    splits.save_to_disk(tmp_path / "two")
    assert rows_of(str(tmp_path / "one")) == [("one", row) for row in (1, 2, 3)]
    assert rows_of(str(tmp_path / "two"), split="held") == [("two", 1)]
    with pytest.raises(DataError, match="no split 'test'; it has train, held"):
        open_source(SourceConfig(path=str(tmp_path / "two"), split="test"))
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="the saved dataset cannot be read"):
        open_source(SourceConfig(path=str(tmp_path / "one")))


def test_digest_depends_on_contents_not_names(write_jsonl: Callable[..., str]) -> None:
    def digest(path: str) -> str:
        return open_source(SourceConfig(path=path)).digest()

    first = digest(write_jsonl([TEXT], "a.jsonl"))
    assert digest(write_jsonl([TEXT], "b.jsonl")) == first
    assert digest(write_jsonl([TEXT], "a.json")) != first, "read by another reader"
    mapped = SourceConfig(path=write_jsonl([TEXT], "a.jsonl"), columns={"chosen": "best"})
    assert open_source(mapped).digest() != first
    assert digest(write_jsonl([{**TEXT, "chosen": "c"}], "a.jsonl")) != first


OTHERS = {"question": "q", "best": "a", "worst": "b", "chosen": "no answer", "system": "s"}
COLUMNS = {"prompt": "question", "chosen": "best", "rejected": "worst"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ""])
def test_mapped_columns_in_every_file_format(tmp_path: Path, suffix: str) -> None:
    """A column with a standard name is not read if its field is mapped to another column."""
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
        [part] = open_source(SourceConfig(path=str(path), columns=columns)).parts
        [raw] = part.read()
        read[name] = pickle.loads(pickle.dumps(raw)).record()
    assert read["ours"] == OTHERS, "without a prompt any text may be it"
    assert read["named"] == {**TEXT, "system": "s"}
    assert read["all"] == {**TEXT, "system": "s"}


def test_unreadable_file_is_reported(write_jsonl: Callable[..., str]) -> None:
    source = open_source(SourceConfig(path=write_jsonl([TEXT])))
    Path(source.parts[0].name).unlink()
    with pytest.raises(DataError, match="the file cannot be read: "):
        source.digest()


def test_hub_dataset_is_loaded_with_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, subset: str | None, split: str, **_: object) -> datasets.Dataset:
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([TEXT])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(SourceConfig(path="owner/pairs", split="train[:5]", subset="en"))
    assert source.parts[0].name == "owner/pairs:en:train[:5]"
    assert [raw.record() for raw in source.parts[0].read()] == [TEXT]
    assert asked == [("owner/pairs", "en", "train[:5]")]
    assert source.digest() != open_source(SourceConfig(path="owner/pairs")).digest()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file or directory"),
        ("./missing", "no such file or directory"),
        ("none/*.parquet", "no such file or directory"),
        ("owner/none", "the hub has no split 'train' of it: gone"),
        ("{tmp}", "the directory contains no data file"),
    ],
)
def test_missing_source_is_reported(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as error:
        open_source(SourceConfig(path=path.format(tmp=tmp_path)))
    assert message in str(error.value)

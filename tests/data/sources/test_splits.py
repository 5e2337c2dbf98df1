"""Which files of a directory, pattern or file are read for a split."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.errors import DataError

TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}

TRAIN_PREFS = "data/train_prefs-00000-of-00001.parquet"
TEST_PREFS = "data/test_prefs-00000-of-00001.parquet"
CLONE = [TRAIN_PREFS, TEST_PREFS, "data/train_sft-00000-of-00001.parquet"]
NOT_DATA = [
    "README.md",
    ".gitattributes",
    "dataset_infos.json",
    ".cache/huggingface/download/data/x.jsonl",
    "data/.ipynb_checkpoints/a-checkpoint.jsonl",
]


def write_files(root: Path, names: Sequence[str]) -> None:
    """Files with one record that names the file; invalid ones where no record may be read."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in NOT_DATA:
            path.write_text("{no record")
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{**TEXT, "prompt": name}]), path)
        else:
            path.write_text(f'{{"prompt": "{name}", "chosen": "a", "rejected": "b"}}\n')


def read(path: Path | str, **fields: Any) -> list[str]:
    """The names of the files that are read, from their records."""
    parts = open_source(SourceConfig(path=str(path), **fields)).parts
    return [raw.record()["prompt"] for part in parts for raw in part.read()]  # type: ignore[index]


SPLITS = [
    pytest.param(CLONE, "train_prefs", [TRAIN_PREFS], id="hub-clone"),
    pytest.param(CLONE, "test_prefs", [TEST_PREFS], id="hub-clone-test"),
    pytest.param(["train/a.csv.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"], id="directories"),
    pytest.param(
        ["a/train-1.jsonl", "a/dev.jsonl"], "validation", ["a/dev.jsonl"], id="file-names"
    ),
    pytest.param(["TRAIN.JSONL", "Test.jsonl"], "train", ["TRAIN.JSONL"], id="upper-case"),
    pytest.param(
        ["train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl"],
        "train_prefs",
        ["train_prefs.jsonl"],
        id="named-like-the-split",
    ),
    pytest.param(["a.jsonl", "test.jsonl"], "train", ["a.jsonl"], id="no-name-is-train"),
    pytest.param(["train/a.jsonl", "test.jsonl"], "train", ["train/a.jsonl"], id="mixed"),
    pytest.param(["train/a.jsonl", "test.jsonl"], "test", ["test.jsonl"], id="mixed-test"),
    pytest.param(
        ["data/train-00000-of-00001.jsonl", "data/test.jsonl"],
        "train",
        ["data/train-00000-of-00001.jsonl"],
        id="shard-and-file",
    ),
    pytest.param(
        ["train-00000-of-00001.jsonl", "validation.jsonl"],
        "validation",
        ["validation.jsonl"],
        id="shard-and-file-outside-data",
    ),
    pytest.param(["a_train.jsonl", "a_held_out.jsonl"], "train", ["a_train.jsonl"], id="examples"),
    pytest.param(["a.jsonl", "holdout/b.jsonl"], "held_out", ["holdout/b.jsonl"], id="held-out"),
]


@pytest.mark.parametrize(("names", "split", "expected"), SPLITS)
def test_only_the_files_of_the_split_are_read(
    names: list[str], split: str, expected: list[str], tmp_path: Path
) -> None:
    write_files(tmp_path, [*names, *NOT_DATA])
    assert read(tmp_path, split=split) == expected


@pytest.mark.parametrize("names", [param.values[0] for param in SPLITS])
def test_several_splits_are_refused_if_none_is_chosen(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, names)
    with pytest.raises(DataError, match=r"its files name several splits: .*choose one, such as"):
        read(tmp_path)


def test_directory_pattern_and_file_have_the_same_splits(tmp_path: Path) -> None:
    write_files(tmp_path, CLONE)
    for path in (tmp_path / "data", tmp_path / "data" / "*.parquet", tmp_path / TRAIN_PREFS):
        assert read(path, split="train_prefs") == [TRAIN_PREFS]
    with pytest.raises(DataError, match="several splits"):
        read(tmp_path / "data" / "t*.parquet")
    with pytest.raises(DataError, match="no split 'train_prefs'; its files are test_prefs"):
        read(tmp_path / TEST_PREFS, split="train_prefs")
    assert read(tmp_path / TEST_PREFS) == [TEST_PREFS], "named itself"
    shards = [f"other/data/{split}-00000-of-00001.jsonl" for split in ("prefs", "sft")]
    write_files(tmp_path, shards)
    for path in ("other", "other/data", "other/data/*"):
        assert read(tmp_path / path, split="sft") == shards[1:]


@pytest.mark.parametrize(
    "names", [["a.jsonl", "b/c.jsonl"], ["data/test-00000-of-00001.parquet"], ["train.jsonl"]]
)
def test_files_of_one_split_need_no_choice(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, [*names, *NOT_DATA])
    assert read(tmp_path) == names


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["a.jsonl"], "validation", r"no split 'validation'; its files are train \(a.jsonl\)"),
        (CLONE, "train", "no split 'train'; its files are "),
        (["a.jsonl"], "train[:10%]", "slices or joins splits, which works for hub datasets only"),
        (["train.jsonl", "test-train.jsonl"], "train", "test-train.jsonl names two splits"),
        (["train/test.jsonl", "a.jsonl"], "train", "train/test.jsonl names two splits"),
        (["test/train-00000-of-00001.jsonl"], "train", "names two splits"),
        (["held_out/train_prefs.jsonl"], "train_prefs", "no split 'train_prefs'"),
        (["a.jsonl", "b.zip"], None, r"b\.zip: cannot read a '\.zip' file; convert, unpack or"),
    ],
)
def test_a_split_that_cannot_be_read_is_refused(
    names: list[str], split: str | None, message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, names)
    with pytest.raises(DataError, match=message):
        read(tmp_path, split=split)


def test_files_without_a_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ["mytest.jsonl", "testset.jsonl"]
    write_files(tmp_path / "one", ["train.jsonl", *others])
    for split in (None, "train"):
        assert read(tmp_path / "one", split=split) == ["train.jsonl"]
    assert "2 files without a split are not read: mytest.jsonl" in caplog.text
    write_files(tmp_path / "two", ["pairs.jsonl", "latest.jsonl", *others])
    caplog.clear()
    assert len(read(tmp_path / "two")) == 4
    assert "mytest.jsonl is trained as 'train'; if it is not meant" in caplog.text
    caplog.clear()
    write_files(tmp_path / "three", ["pairs.jsonl", "latest.jsonl", "contest.jsonl"])
    assert len(read(tmp_path / "three")) == 3 and not caplog.text


def test_a_pattern_keeps_splits_apart(tmp_path: Path) -> None:
    write_files(tmp_path, ["train/a.jsonl", "test.jsonl"])
    with pytest.raises(DataError, match="several splits"):
        read(tmp_path / "**" / "*.jsonl")
    assert read(tmp_path / "**" / "*.jsonl", split="train") == ["train/a.jsonl"]


def test_missing_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path, [f"data/train-0000{at}-of-00003.jsonl" for at in (0, 2)])
    assert len(read(tmp_path)) == 2
    assert "1 of 3 shards are missing, the first is data/train-00001-of-00003.jsonl" in caplog.text


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", ["b.jsonl"])
    write_files(tmp_path / "data", ["a.jsonl", "inside/c.jsonl"])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert sorted(read(tmp_path / "data")) == ["a.jsonl", "b.jsonl", "inside/c.jsonl"]


README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: english/part-*
  - split: held
    path: [english/held.jsonl]
- config_name: de
  data_dir: german
---
"""
SUBSETS = ["english/part-1.jsonl", "english/held.jsonl", "german/train.jsonl", "german/test.jsonl"]


def test_splits_and_subsets_of_the_readme(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path, [*SUBSETS, "english/old.jsonl"])
    (tmp_path / "README.md").write_text(README)
    assert read(tmp_path, subset="en", split="train") == SUBSETS[:1]
    assert "4 files without a split are not read" not in caplog.text
    assert read(tmp_path, subset="en", split="held") == SUBSETS[1:2]
    assert read(tmp_path, subset="de", split="test") == SUBSETS[3:]
    for fields, message in (
        ({}, "README.md declares several subsets: en, de"),
        ({"subset": "fr"}, "no subset 'fr': README.md declares en, de"),
        ({"subset": "en"}, r"several splits: train \(english/part-1.jsonl\), held"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path, **fields)
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_files: 5}]\n---\n")
    with pytest.raises(DataError, match=r"README\.md: `configs` cannot be read"):
        read(tmp_path)
    (tmp_path / "README.md").unlink()
    with pytest.raises(DataError, match=r"no subset 'en': no README\.md declares it"):
        read(tmp_path, subset="en")


def test_the_rules_are_those_of_datasets(tmp_path: Path) -> None:
    """The same files for every split as `datasets` finds in the directory."""
    for number, names in enumerate((CLONE, *(param.values[0] for param in SPLITS[2:4]))):
        root = tmp_path / str(number)
        write_files(root, [*names, *NOT_DATA])
        patterns = datasets.data_files.get_data_patterns(str(root))
        found = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(root))
        assert len(found) > 1
        for split, files in found.items():
            expected = sorted(str(Path(file).relative_to(root)) for file in files)
            assert sorted(read(root, split=str(split))) == expected


def test_saved_datasets_keep_their_split(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([TEXT], split="test")
    dataset.save_to_disk(tmp_path / "one" / "saved")
    assert read(tmp_path / "one" / "saved") == read(tmp_path / "one" / "saved", split="test")
    with pytest.raises(DataError, match="no split 'train'; it has test"):
        read(tmp_path / "one" / "saved", split="train")
    with pytest.raises(DataError, match=r"contains .*saved, which `datasets` saved; name each"):
        read(tmp_path / "one")


def test_an_empty_shard_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, ["a.jsonl"])
    for name in ("b.jsonl", "c.json", "d.csv", "e.parquet", "f.arrow", "g.jsonl.gz"):
        (tmp_path / name).touch()
    table = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "h.parquet")
    pq.write_table(pa.table({}), tmp_path / "i.parquet")
    with caplog.at_level(logging.WARNING, "megatron_idpo"):
        assert read(tmp_path) == ["a.jsonl"]
    assert caplog.text.count("is empty (0 bytes)") == 6

"""Directories of data files: the splits that are read against those that `datasets` finds."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.errors import DataError

from .budget import count, inputs

WORDS = ["train", "test", "validation", "dev", "eval", "data", "prefs", "a", "held_out", "mytest"]
SPLITS = ["train", "validation", "test", "train_prefs", "test_prefs", "held_out"]
HELD_OUT = {"test", "validation", "dev", "eval", "held", "valid", "val"}

words = st.sampled_from(WORDS)
stems = (
    words
    | st.builds("{}-00000-of-00001".format, st.sampled_from(["train", "test", "test_prefs", "a"]))
    | st.builds("{}_{}".format, words, words)
)
names = st.builds(
    lambda directories, stem: "/".join([*directories, f"{stem}.jsonl"]),
    st.lists(words, max_size=2),
    stems,
)
layouts = st.lists(names, min_size=1, max_size=4, unique=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("layouts")


def second_reading(root: Path) -> dict[str, set[str]]:
    """The splits as `datasets` resolves them, from its patterns for this directory."""
    patterns = datasets.data_files.get_data_patterns(str(root))
    found = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(root))
    names = {
        str(split): {str(Path(file).relative_to(root)) for file in files}
        for split, files in found.items()
    }
    # A keyword of ours only: `datasets` leaves such a file unread, or has it in train.
    return {
        split: {file for file in files if "held_out" not in file} for split, files in names.items()
    }


def files_of(root: Path, split: str | None) -> set[str] | None:
    """The files that are read; None if that is refused."""
    try:
        parts = open_source(SourceConfig(path=str(root), split=split)).parts
    except DataError as error:
        assert "\n" not in str(error) and error.problems[0].remedy, error
        count("split layouts", "refused")
        return None
    count("split layouts", "read")
    return {str(file.relative_to(root)) for part in parts for file in part.files}


def is_held_out(name: str) -> bool:
    """Whether a word of the name says that it is not for training."""
    return bool(HELD_OUT & set(re.split(r"[^a-z]+", name.lower())))


@inputs(30)
@given(layout=layouts)
@example(layout=["train/a.jsonl", "test.jsonl"])
@example(layout=["data/train-00000-of-00001.jsonl", "data/test.jsonl"])
@example(layout=["train-00000-of-00001.jsonl", "validation.jsonl"])
@example(layout=["train.jsonl", "mytest.jsonl", "held_out.jsonl"])
@example(layout=["a_train.jsonl", "a_held_out.jsonl"])
@example(layout=["train/test.jsonl", "a.jsonl"])
@example(layout=["test/train-00000-of-00001.jsonl", "a.jsonl"])
def test_a_split_has_the_files_that_datasets_finds(scratch: Path, layout: list[str]) -> None:
    shutil.rmtree(scratch / "root", ignore_errors=True)
    root = scratch / "root"
    for name in layout:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'{{"prompt": "{name}", "chosen": "a", "rejected": "b"}}\n')
    theirs = second_reading(root)
    for split in (None, *SPLITS):
        ours = files_of(root, split)
        if ours is None:
            continue
        assert ours
        named = theirs.get(split or "", set())
        if split is None:
            assert sum(bool(files & ours) for files in theirs.values()) <= 1, "splits are mixed"
            continue
        # Shards outside of `data` name finer splits here: `test_prefs` is `test` in `datasets`.
        finer = {name for name in named if "-of-" in name and f"{split}-" not in name}
        assert named - finer <= ours, f"files of {split} are left out"
        others = {
            their_split: files
            for their_split, files in theirs.items()
            if not split.startswith(their_split)
        }
        assert not ours & set().union(*others.values()), f"{split} has files of another split"
        if split.startswith("train"):
            assert not any(map(is_held_out, ours - named)), f"held-out files in {split}"

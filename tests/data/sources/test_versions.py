"""A directory above several versions of a dataset is not read as one dataset."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.errors import DataError

OLD, NEW = "2" * 40, "1" * 40
TRAIN, TEST = "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"
INFO = "dataset_info.json"


def read(path: Path, **fields: Any) -> list[str]:
    """The files that would be read."""
    parts = open_source(SourceConfig(path=str(path), **fields)).parts
    return [part.name for part in parts]


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset in the hub's cache: files are links to blobs; `main` is the newer revision."""
    root = tmp_path / "hub" / "datasets--x--y"
    write(root / "refs" / "main", NEW)
    for revision in (OLD, NEW):
        for name in (TRAIN, TEST):
            blob = write(root / "blobs" / f"{revision[0]}{name[5:7]}")
            link = root / "snapshots" / revision / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return root


@pytest.mark.parametrize("named", ["hub", "hub/*", "hub/*/snapshots/*/data/*.jsonl"])
def test_several_revisions_are_refused(repository: Path, tmp_path: Path, named: str) -> None:
    main = repository / "snapshots" / NEW
    with pytest.raises(DataError, match=rf"holds 2 versions .*; name one .* such as {main}$"):
        read(tmp_path / named, split="train")
    assert read(main, split="train") == [str(main / TRAIN)], "the remedy works"
    assert read(main / "data", split="train") == [str(main / TRAIN)]


def test_the_only_revision_is_read_as_its_readme_says(repository: Path) -> None:
    revision = repository / "snapshots" / NEW
    (repository / "snapshots" / OLD).rename(repository.parent / "elsewhere")
    text = f"---\nconfigs:\n- config_name: a\n  data_files: {TEST}\n---\n"
    write(revision / "README.md", text)
    assert read(repository, subset="a") == [str(revision / TEST)]


def test_versions_that_datasets_has_prepared(tmp_path: Path) -> None:
    first, second = tmp_path / "default" / "0.0.0" / "a", tmp_path / "default" / "0.0.1" / "b"
    whole = write(first / "y-train.arrow")
    write(first / INFO)
    assert read(tmp_path) == [str(whole)]
    filtered = write(first / "cache-0123456789abcdef.arrow")
    with pytest.raises(DataError, match=rf"holds {filtered}, a result of `map` or `filter`"):
        read(tmp_path)
    assert read(filtered) == [str(filtered)], "named itself"
    write(second / "y-train.arrow")
    write(second / INFO)
    with pytest.raises(DataError, match=rf"holds 2 versions or datasets: {first}, {second}"):
        read(tmp_path)

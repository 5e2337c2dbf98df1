"""Where preference pairs come from: files, directories, saved datasets, the hub.

A `Source` is one named origin with a weight. `open_source` finds its parts and offers their rows in
order and a digest of their contents, which the tokenised cache is keyed by. What is in a row is
`readers.py`; how sources are mixed is `dataset.py`.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_idpo.data.sources.columns import AS_OURS, Columns
from megatron_idpo.data.sources.preferences import Format
from megatron_idpo.data.sources.readers import SUFFIXES, RawRow, file_kind, read_dataset, read_file
from megatron_idpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One origin of pairs."""

    path: str
    """A file (`.jsonl .json .parquet .csv .arrow`), a pattern such as `data/*.jsonl`, a directory
    of files or of `datasets.save_to_disk`, or a dataset's name on the hub."""

    weight: float = 1.0
    """How often a pair of this source occurs in one epoch: 2 twice, 0.25 a seeded quarter."""

    split: str = "train"
    """Of a hub dataset or a saved `DatasetDict`."""

    subset: str | None = None
    """The configuration of a hub dataset."""

    format: Format | None = None
    """What its records are, where that is another than that of the other sources."""

    columns: Columns = field(default_factory=lambda: AS_OURS)
    """Which of its columns stand for what, where they have not our names."""


@dataclass(frozen=True)
class Part:
    """A named piece of a source whose rows are numbered on their own."""

    name: str
    read: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...]
    """What its contents are, for the digest."""

    selection: str = ""
    """Which rows of those files, where it may not be all (a hub split such as `train[:10%]`)."""


@dataclass(frozen=True)
class OpenSource:
    """A source that has been found."""

    source: Source
    parts: tuple[Part, ...]

    def digest(self) -> str:
        """sha256 over the contents of all parts, in order, and what their columns stand for.

        Of files' names only the kind enters.

        Raises:
            DataError: a file cannot be read.
        """
        total = hashlib.sha256()
        for part in self.parts:
            for path in part.files:
                try:
                    with path.open("rb") as file:
                        total.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise DataError.at(str(path), f"the file cannot be read: {error}") from None
                total.update(os.fsencode(file_kind(path)))
            total.update(f"part {part.selection}\n".encode())
        total.update(json.dumps(dict(self.source.columns), sort_keys=True).encode())
        return total.hexdigest()


def open_source(source: Source) -> OpenSource:
    """Finds a source's files or dataset.

    Raises:
        DataError: it does not exist, holds nothing that can be read, or the hub refuses it.
    """
    path = Path(source.path)
    parts: tuple[Part, ...]
    if path.exists():
        parts = _local(source, path)
    elif matches := sorted(glob.glob(source.path, recursive=True)):
        parts = tuple(chain.from_iterable(_local(source, Path(match)) for match in matches))
    elif _looks_like_files(source.path):
        raise DataError.at(source.path, "no such file or directory", "check the path")
    else:
        parts = (_hub(source),)
    return OpenSource(source, parts)


def _local(source: Source, path: Path) -> tuple[Part, ...]:
    return _directory(source, path) if path.is_dir() else (_file(source, path),)


def _file(source: Source, path: Path) -> Part:
    return Part(str(path), partial(read_file, path, source.columns), (path,))


def _directory(source: Source, path: Path) -> tuple[Part, ...]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return (_saved(source, path),)
    endings = tuple(suffix + end for suffix in SUFFIXES for end in ("", ".gz"))
    found = sorted(file for file in path.rglob("*") if file.name.endswith(endings))
    if not found:
        raise DataError.at(
            str(path), "the directory holds no data file", f"known are {' '.join(SUFFIXES)}"
        )
    return tuple(_file(source, file) for file in found)


def _saved(source: Source, path: Path) -> Part:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
    # A damaged directory fails wherever the library happens to look first.
    except Exception as error:
        raise DataError.at(str(path), f"the saved dataset cannot be read: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            named = ", ".join(loaded)
            raise DataError.at(str(path), f"no split '{source.split}'", f"it has {named}")
        loaded = loaded[source.split]
    return _dataset_part(source, source.path, loaded)


def _hub(source: Source) -> Part:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, keep_in_memory=False
        )
    # Whatever goes wrong with the hub (names, splits, network, login) is told in its words.
    except Exception as error:
        raise DataError.at(
            source.path,
            f"is no local file, and the hub gives no split '{source.split}' of it: {error}",
            "check the path or the name, data's split and subset, and the network",
        ) from error
    name = ":".join(filter(None, (source.path, source.subset, source.split)))
    return _dataset_part(source, name, loaded, source.split)


def _dataset_part(source: Source, name: str, dataset: Any, selection: str = "") -> Part:
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    if not files:  # Nothing to hash: `datasets` has a fingerprint of its own.
        selection += dataset._fingerprint
    return Part(name, partial(read_dataset, dataset, source.columns), files, selection)


def _looks_like_files(path: str) -> bool:
    """Hub names are `name` or `owner/name`, without a data file's ending."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "*" in path
        or path.removesuffix(".gz").endswith(SUFFIXES)
    )

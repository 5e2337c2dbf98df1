"""Open sources of preference pairs: files, directories, saved datasets, the hub.

`open_source` resolves a `SourceConfig` into parts, which yield their rows in order, and a digest of
their contents, which is part of the token cache's key. `readers.py` parses rows;
`tokenize/dataset.py` mixes sources.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.readers import SUFFIXES, RawRow, file_kind, read_dataset, read_file
from megatron_idpo.data.sources.record import Columns
from megatron_idpo.errors import DataError


@dataclass(frozen=True)
class Part:
    """A named piece of a source with its own row numbers."""

    name: str
    read: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...]
    """The files with its contents, for the digest."""

    selection: str = ""
    """Which rows of those files, if it may not be all (a hub split such as `train[:10%]`)."""


@dataclass(frozen=True)
class OpenSource:
    """A source whose parts are known."""

    source: SourceConfig
    parts: tuple[Part, ...]

    def digest(self) -> str:
        """sha256 over the contents of all parts, in order, and the column mapping.

        A file's name does not matter, except for its kind.

        Raises:
            DataError: a file cannot be read.
        """
        total = hashlib.sha256()
        for part in self.parts:
            for path in part.files:
                with DataError.on_os_error(str(path), "the file cannot be read"):
                    with path.open("rb") as file:
                        total.update(hashlib.file_digest(file, "sha256").digest())
                total.update(os.fsencode(file_kind(path)))
            total.update(f"part {part.selection}\n".encode())
        total.update(json.dumps(_columns(self.source), sort_keys=True).encode())
        return total.hexdigest()

    def location(self, part: int, row: int) -> str:
        """`file:row` for messages, or the file alone for row 0."""
        name = self.parts[part].name
        return f"{name}:{row}" if row else name


def open_source(source: SourceConfig) -> OpenSource:
    """Find a source's files or dataset.

    Raises:
        DataError: it does not exist, contains nothing readable, or the hub refuses it.
    """
    path = Path(source.path)
    if path.exists():
        parts = _local(source, path)
    elif matches := sorted(glob.glob(source.path, recursive=True)):
        parts = tuple(chain.from_iterable(_local(source, Path(match)) for match in matches))
    elif _looks_like_files(source.path):
        raise DataError.at(source.path, "no such file or directory", "check the path")
    else:
        parts = (_hub(source),)
    return OpenSource(source, parts)


def _columns(source: SourceConfig) -> Columns:
    columns: dict[str, str] = source.columns.model_dump(exclude_none=True)
    return columns


def _local(source: SourceConfig, path: Path) -> tuple[Part, ...]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return (_saved(source, path),)
    files = [path]
    if path.is_dir():
        suffixes = tuple(suffix + end for suffix in SUFFIXES for end in ("", ".gz"))
        files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes))
    if not files:
        raise DataError.at(
            str(path), "the directory contains no data file", f"supported: {' '.join(SUFFIXES)}"
        )
    columns = _columns(source)
    return tuple(Part(str(file), partial(read_file, file, columns), (file,)) for file in files)


def _saved(source: SourceConfig, path: Path) -> Part:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
    # The exception depends on which step of the library fails first.
    except Exception as error:
        raise DataError.at(str(path), f"the saved dataset cannot be read: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            splits = ", ".join(loaded)
            raise DataError.at(str(path), f"no split '{source.split}'", f"it has {splits}")
        loaded = loaded[source.split]
    return _dataset_part(source, source.path, loaded)


def _hub(source: SourceConfig) -> Part:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, keep_in_memory=False
        )
    # Names, splits, network, login: the hub's own message explains it best.
    except Exception as error:
        raise DataError.at(
            source.path,
            f"not a local file, and the hub has no split '{source.split}' of it: {error}",
            "check the path or the name, data's split and subset, and the network",
        ) from error
    name = ":".join(filter(None, (source.path, source.subset, source.split)))
    return _dataset_part(source, name, loaded, source.split)


def _dataset_part(source: SourceConfig, name: str, dataset: Any, selection: str = "") -> Part:
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    if not files:  # Nothing to hash: use the fingerprint of `datasets` instead.
        selection += dataset._fingerprint
    return Part(name, partial(read_dataset, dataset, _columns(source)), files, selection)


def _looks_like_files(path: str) -> bool:
    """Hub names are `name` or `owner/name`, without a data file's suffix."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "*" in path
        or path.removesuffix(".gz").endswith(SUFFIXES)
    )

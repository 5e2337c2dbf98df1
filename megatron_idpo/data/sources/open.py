"""Open sources of preference pairs: files, directories, saved datasets, the hub.

`open_source` resolves a `SourceConfig` into parts, which yield their rows in order, and a digest of
their contents, which is part of the token cache's key. `splits.py` chooses files by `split`;
`readers.py` parses rows; `tokenize/dataset.py` mixes sources.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.readers import (
    SUPPORTED,
    RawRow,
    file_kind,
    is_supported,
    read_dataset,
    read_file,
)
from megatron_idpo.data.sources.record import Columns
from megatron_idpo.data.sources.splits import DEFAULT_SPLIT, check_split, choose_files, is_data_name
from megatron_idpo.data.sources.versions import only_version
from megatron_idpo.errors import DataError

_UNREADABLE_SUFFIXES = {".zip", ".tar", ".tgz", ".7z", ".lz4", ".br", ".feather", ".orc", ".avro"}
_UNREADABLE_SUFFIXES |= {".xlsx", ".pkl", ".pickle", ".tfrecord", ".msgpack", ".db", ".sqlite"}
"""Files in a directory that may hold pairs: leaving them out would be silent."""


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
        DataError: it does not exist, contains nothing readable, its files name several splits and
            none is chosen, or the hub refuses it.
    """
    path = Path(source.path)
    if path.exists():
        parts = _local(source, [path])
    elif matches := sorted(glob.glob(source.path, recursive=True)):
        parts = _local(source, [Path(match) for match in matches])
    elif _looks_like_files(source.path):
        raise DataError.at(source.path, "no such file or directory", "check the path")
    else:
        parts = (_hub(source),)
    return OpenSource(source, parts)


def is_on_hub(source: SourceConfig) -> bool:
    """Whether a source is read from the hub, because no file has its path."""
    path = source.path
    is_local = Path(path).exists() or glob.glob(path, recursive=True) or _looks_like_files(path)
    return not is_local


def _columns(source: SourceConfig) -> Columns:
    columns: dict[str, str] = source.columns.model_dump(exclude_none=True)
    return columns


def _local(source: SourceConfig, paths: Sequence[Path]) -> tuple[Part, ...]:
    """The parts of a file, a directory, or of all that a pattern matches."""
    saved = [path for path in paths if _is_saved(path)]
    if saved and saved == [*paths]:
        return tuple(_saved(source, path) for path in saved)
    is_named = [*paths] == [Path(source.path)] and paths[0].is_file()
    files = [*paths] if is_named else _data_files(source, paths)
    saved += [file.parent for file in files if file not in paths and _is_saved(file.parent)]
    if saved:
        message = f"contains {saved[0]}, which `datasets` saved"
        raise DataError.at(source.path, message, "name each saved dataset as a source")
    # A file that is named itself may have any name, unless a split is chosen too.
    if not is_named or source.split is not None or source.subset is not None:
        root = paths[0] if paths[0].is_dir() else paths[0].parent
        if len(paths) > 1:
            root = Path(os.path.commonpath([path.parent for path in paths]))
        version = None if is_named else only_version(source.path, files)
        if version is not None and version.is_relative_to(root):
            root = version  # Its README and directories name the splits.
        files = choose_files(source, root, files)
    columns = _columns(source)
    return tuple(Part(str(file), partial(read_file, file, columns), (file,)) for file in files)


def _is_saved(directory: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
    return any((directory / name).exists() for name in ("dataset_dict.json", "state.json"))


def _data_files(source: SourceConfig, paths: Sequence[Path]) -> list[Path]:
    """The data files that a pattern matches, and those below its directories; no hidden ones.

    Raises:
        DataError: there are none, or files that look like data and cannot be read.
    """
    files: list[Path] = []
    for path in paths:
        below = _files_below(path) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        files += [file for file in below if is_data_name(file.relative_to(root).as_posix())]
    files = [file for file in files if file.is_file()]
    remedy = f"supported are {SUPPORTED}"
    if unreadable := [file for file in files if file.suffix.lower() in _UNREADABLE_SUFFIXES]:
        message = f"cannot read a '{unreadable[0].suffix}' file"
        raise DataError.at(str(unreadable[0]), message, f"convert, unpack or remove it; {remedy}")
    supported = [file for file in files if is_supported(file)]
    if not supported:
        kind = "directory" if Path(source.path).is_dir() else "pattern"
        raise DataError.at(source.path, f"the {kind} contains no data file", remedy)
    return supported


def _files_below(directory: Path) -> list[Path]:
    """All files below, also those in directories that are links; each directory once."""
    found: list[Path] = []
    seen = {os.path.realpath(directory)}
    for current, directories, files in os.walk(directory, followlinks=True):
        below = {os.path.realpath(Path(current, name)): name for name in directories}
        directories[:] = [name for real, name in below.items() if real not in seen]
        seen.update(below)
        found += [Path(current, name) for name in files]
    return sorted(found)


def _saved(source: SourceConfig, path: Path) -> Part:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
    # The exception depends on which step of the library fails first.
    except Exception as error:
        raise DataError.at(str(path), f"the saved dataset cannot be read: {error}") from error
    if source.subset is not None:
        message = f"no subset '{source.subset}': a saved dataset has none"
        raise DataError.at(str(path), message, "leave `subset` out")
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[check_split(str(path), source.split, list(loaded))]
    else:
        check_split(str(path), source.split, [str(loaded.split or DEFAULT_SPLIT)])
    return _dataset_part(source, str(path), loaded)


def _hub(source: SourceConfig) -> Part:
    import datasets

    split = source.split or DEFAULT_SPLIT
    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=split, keep_in_memory=False
        )
    # Names, splits, network, login: the hub's own message explains it best.
    except Exception as error:
        raise DataError.at(
            source.path,
            f"not a local file, and the hub has no split '{split}' of it: {error}",
            "check the path or the name, data's split and subset, and the network",
        ) from error
    name = ":".join(filter(None, (source.path, source.subset, split)))
    return _dataset_part(source, name, loaded, split)


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
        or is_supported(Path(path))
    )

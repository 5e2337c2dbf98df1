"""Directories in which Hugging Face libraries keep several versions of a dataset.

The hub's cache has one directory per downloaded revision (`snapshots/REVISION`), and that of
`datasets` one per prepared version, with results of `map` and `filter` next to it. A directory
above them stands for one of them: reading all would train rows twice, or rows that a filter has
removed.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_idpo.errors import DataError

_INTERMEDIATE = re.compile(r"cache-[0-9a-f]{16}(?:_\d{5}_of_\d{5})?\.arrow")
"""The name that `datasets` gives to the result of `map` or `filter`."""


def only_version(path: str, files: Sequence[Path]) -> Path | None:
    """The directory of the version that the files belong to; None if they belong to none.

    Args:
        path: what the user named, for messages.
        files: the data files that a directory holds or a pattern matches.

    Raises:
        DataError: they belong to several, or one is an intermediate result.
    """
    versions = list(dict.fromkeys(filter(None, map(_version_of, files))))
    if len(versions) > 1:
        message = f"holds {len(versions)} versions or datasets: {versions[0]}, {versions[1]}, ..."
        remedy = f"name one in `path`, such as {_current(versions)}"
        raise DataError.at(path, message, remedy)
    for file in files:
        if _INTERMEDIATE.fullmatch(file.name):
            message = f"holds {file}, a result of `map` or `filter` that `datasets` has cached"
            raise DataError.at(path, message, "name the file that is meant in `path`")
    return versions[0] if versions else None


def _version_of(file: Path) -> Path | None:
    for directory in file.parents:
        if _is_snapshot(directory):
            return directory
    is_prepared = file.suffix == ".arrow" and (file.parent / "dataset_info.json").is_file()
    return file.parent if is_prepared else None


def _is_snapshot(directory: Path) -> bool:
    """Whether it is a revision in the hub's cache."""
    repository = directory.parent.parent
    is_inside = directory.parent.name == "snapshots"
    return is_inside and any((repository / name).is_dir() for name in ("refs", "blobs"))


def _current(versions: Sequence[Path]) -> Path:
    """The revision that a branch of the repository points to, if there is one."""
    named = {reference for version in versions for reference in _references(version)}
    return next((version for version in versions if version.name in named), versions[-1])


def _references(version: Path) -> Iterator[str]:
    for file in sorted((version.parent.parent / "refs").glob("*")):
        if file.is_file():
            yield file.read_text("utf-8", errors="replace").strip()

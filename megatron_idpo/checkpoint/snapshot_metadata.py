"""`snapshot.json`: the identity of an sDPO step's snapshot and the hash of each of its files.

A sealed JSON file. Nothing here is collective.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.sealed import read_sealed, write_sealed

FILE = "snapshot.json"
ADAPTER = "adapter"
"""Subdirectory of a carried adapter."""

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The content of `snapshot.json`."""

    identity: str
    """Of the model: of the weights, and of the adapter if there is one."""

    tensors: str
    """Of the tensors in the snapshot: all weights, or the adapter's."""

    base: str | None
    """If the snapshot holds only an adapter: the identity of the weights that it belongs to."""

    files: dict[str, str]
    """Relative path -> sha256 of every other file."""

    total_bytes: int
    """Total size of those files."""


def read_snapshot(directory: Path) -> Snapshot:
    """Reads the `snapshot.json` of a snapshot; does not check its other files.

    Raises:
        CheckpointError: the file is missing or was changed.
    """
    values = read_sealed(directory / FILE, remedy=remedy(directory))
    if values.pop("format", None) != _FORMAT:
        message = "was written by another version of megatron-idpo"
        raise CheckpointError.at(str(directory / FILE), message, "use that version")
    return Snapshot(**values)


def write_description(directory: Path, snapshot: Snapshot) -> None:
    """Writes the `snapshot.json` of a snapshot.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_sealed(directory / FILE, {"format": _FORMAT, **asdict(snapshot)})


def whole_snapshot(directory: Path) -> Snapshot | None:
    """The snapshot of a model directory; None if the directory is not a snapshot.

    Raises:
        CheckpointError: it holds only an adapter, or its `snapshot.json` was changed.
    """
    if not (directory / FILE).is_file():
        return None
    snapshot = read_snapshot(directory)
    if snapshot.base is not None:
        message = "is an adapter for the first model of its run, not a model"
        remedy = f"name the first model, and {directory / ADAPTER} in lora.adapter"
        raise CheckpointError.at(str(directory), message, remedy)
    return snapshot


def files_below(directory: Path) -> list[str]:
    """The relative paths of every file except `snapshot.json`, sorted.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    with CheckpointError.on_os_error(str(directory), "cannot be read", remedy(directory)):
        paths = (path for path in directory.rglob("*") if not path.is_dir())
        names = sorted(str(path.relative_to(directory)) for path in paths)
    return [name for name in names if name != FILE]


def check_names(directory: Path, snapshot: Snapshot) -> None:
    """Checks that the snapshot has exactly the listed files.

    Raises:
        CheckpointError: a file is missing or was added.
    """
    names = set(files_below(directory))
    for name in sorted(snapshot.files.keys() - names):
        raise CheckpointError.at(str(directory / name), "is missing", remedy(directory))
    for name in sorted(names - snapshot.files.keys()):
        message = f"is not listed in {FILE}"
        raise CheckpointError.at(str(directory / name), message, "move it out of the snapshot")


def check_digests(directory: Path, snapshot: Snapshot, digests: Sequence[str]) -> None:
    """Compares the hashes of the listed files, in the order of the list.

    Raises:
        CheckpointError: a file was changed.
    """
    for (name, expected), digest in zip(snapshot.files.items(), digests, strict=True):
        if digest != expected:
            message = "has been changed since it was written"
            raise CheckpointError.at(str(directory / name), message, remedy(directory))


def remedy(directory: Path) -> str:
    """The remedy for a damaged snapshot."""
    return f"restore {directory} from a backup, or start again in another training.output"

"""`snapshot.json`: what a snapshot of an sDPO step is, and every file's hash. Sealed; no library is
needed to read it. Nothing here is collective.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.sealed import read_sealed, write_sealed

FILE = "snapshot.json"
ADAPTER = "adapter"
"""Where a carried adapter lies in it."""

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What `snapshot.json` says."""

    identity: str
    """Of the model as a whole: of the weights, and of the adapter on them if there is one."""

    tensors: str
    """Of the tensors in the snapshot: all weights, or the adapter's."""

    base: str | None
    """Where only an adapter is in it, the identity of the weights it belongs on."""

    files: dict[str, str]
    """sha256 of every other file, by its path in the snapshot."""

    total_bytes: int
    """Of those files."""


def read_snapshot(directory: Path) -> Snapshot:
    """What a snapshot says of itself; its other files are not looked at. Not collective.

    Raises:
        CheckpointError: there is none, or its `snapshot.json` was changed.
    """
    values = read_sealed(directory / FILE, remedy=remedy(directory))
    if values.pop("format", None) != _FORMAT:
        message = "was written by another version of megatron-idpo"
        raise CheckpointError.at(str(directory / FILE), message, "go on with that version")
    return Snapshot(**values)


def write_description(directory: Path, snapshot: Snapshot) -> None:
    """Write what a snapshot is into its directory.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_sealed(directory / FILE, {"format": _FORMAT, **asdict(snapshot)})


def whole_snapshot(directory: Path) -> Snapshot | None:
    """What a model's directory says of itself if it is a snapshot; None if it is none.

    Raises:
        CheckpointError: it holds an adapter alone, or its `snapshot.json` was changed.
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
    """Every file but `snapshot.json`, by its path in the snapshot, in the order of names.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    try:
        names = sorted(str(path.relative_to(directory)) for path in paths)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise CheckpointError.at(str(directory), message, remedy(directory)) from None
    return [name for name in names if name != FILE]


def check_names(directory: Path, snapshot: Snapshot) -> None:
    """Compare the files that are there with those that were written.

    Raises:
        CheckpointError: one is missing, or one was added.
    """
    there = set(files_below(directory))
    for name in sorted(snapshot.files.keys() - there):
        raise CheckpointError.at(str(directory / name), "is missing", remedy(directory))
    for name in sorted(there - snapshot.files.keys()):
        message = f"is none of the files that {FILE} lists"
        raise CheckpointError.at(str(directory / name), message, "move it out of the snapshot")


def check_digests(directory: Path, snapshot: Snapshot, digests: Sequence[str]) -> None:
    """Compare the hashes of the listed files, in their order.

    Raises:
        CheckpointError: a byte of one has changed.
    """
    for (name, sha256), found in zip(snapshot.files.items(), digests, strict=True):
        if found != sha256:
            message = "has been changed since it was written"
            raise CheckpointError.at(str(directory / name), message, remedy(directory))


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise CheckpointError.at(str(path), message, "make it readable, or copy it anew") from None


def remedy(directory: Path) -> str:
    """What to do about a snapshot that is not what it was."""
    return f"copy {directory} back from where it is whole, or begin anew in another training.output"

"""`snapshot.json`: what a snapshot is, and every file's hash. Sealed; no library is needed to read
it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.sealed import read_sealed, write_sealed

FILE = "snapshot.json"
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
        told = "was written by another version of megatron-idpo"
        raise CheckpointError.at(str(directory / FILE), told, "go on with that version")
    return Snapshot(**values)


def write_description(directory: Path, snapshot: Snapshot) -> None:
    """Write what a snapshot is into its directory.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_sealed(directory / FILE, {"format": _FORMAT, **asdict(snapshot)})


def remedy(directory: Path) -> str:
    """What to do about a snapshot that is not what it was."""
    return f"copy {directory} back from where it is whole, or begin anew in another training.output"

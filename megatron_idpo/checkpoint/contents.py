"""`checksums.json`: what a checkpoint consists of, a sealed file that binds its parts together.

It has the checksum of every small file and of every stored piece of a tensor, computed while they
were written, and for a training state its step and the name of its directory. A reader compares
what it reads: the small files before they are parsed, each piece of a tensor before it is
deserialized. Files of two steps that were exchanged, edited files and renamed directories are
refused by name. A rank reads and checks only the pieces that it needs.

A training state without the file is refused. Checkpoints of weights may come from other programs;
without the file, their tensors are compared with the CRC in the archives that torch writes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.checksums import check_file, file_checksum, section_checksum
from megatron_idpo.storage.sealed import read_sealed, write_sealed

FILE = "checksums.json"

_FORMAT = 1

Pieces = Mapping[str, Mapping[str, str]]
"""File name -> position of a piece's first byte, as text -> checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The content of `checksums.json`."""

    directory: Path
    name: str | None
    """The directory's name; None for a checkpoint of weights, which may be renamed."""

    files: Mapping[str, str]
    """Name -> checksum of each file that is read as a whole."""

    pieces: Pieces

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Compares files, by default all that are read as a whole.

        Raises:
            CheckpointError: one is missing or has been changed.
        """
        for name in self.files if names is None else names:
            path = self.directory / name
            check_file(path, self.files.get(name, ""), error=CheckpointError, remedy=self.remedy)

    def is_unchanged(self, file: BinaryIO, name: str, offset: int, num_bytes: int) -> bool:
        """Compares one piece of a tensor, read in small blocks.

        Args:
            file: open, unbuffered.
            name: of the file.
            offset: of the piece's first byte.
            num_bytes: of the piece.

        Raises:
            OSError: it cannot be read.
        """
        expected = self.pieces.get(name, {}).get(str(offset))
        return section_checksum(file, offset, num_bytes) == expected

    @property
    def remedy(self) -> str:
        """For a damaged file."""
        return _remedy(self.directory, is_state=self.name is not None)


def write_contents(directory: Path, pieces: Pieces, *, target: Path | None = None) -> None:
    """Writes the file; by one process, when all other files are complete.

    Args:
        directory: the checkpoint.
        pieces: what the ranks have written.
        target: the final directory of a training state.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    with CheckpointError.on_os_error(str(directory), "cannot be read"):
        others = sorted(
            path for path in directory.iterdir() if path.is_file() and path.name not in pieces
        )
        files = {path.name: file_checksum(path) for path in others}
    name = None if target is None else target.name
    values = {"format": _FORMAT, "directory": name, "files": files, "pieces": pieces}
    # On one line: with indentation, Python's slow encoder would write a line per piece.
    write_sealed(directory / FILE, values, indent=None)


def read_contents(directory: Path, *, is_state: bool) -> Contents:
    """Reads the file; the other files are not checked yet.

    Args:
        directory: the checkpoint.
        is_state: whether it must be a training state under the name that it was written with.

    Raises:
        CheckpointError: it is missing, has been changed or is of another version; the directory
            has been renamed.
    """
    path, remedy = directory / FILE, _remedy(directory, is_state=is_state)
    values = read_sealed(path, remedy=remedy, indent=None)
    if values["format"] != _FORMAT:
        message = "was written by another version of megatron-idpo"
        raise CheckpointError.at(str(path), message, "use that version")
    name = values["directory"]
    if is_state and name != directory.name:
        message = f"was written as {name}" if name else "is not the state of a run"
        raise CheckpointError.at(str(directory), message, f"rename it back, or {remedy}")
    return Contents(directory=directory, name=name, files=values["files"], pieces=values["pieces"])


def contents_if_recorded(directory: Path) -> Contents | None:
    """The checked contents of a checkpoint of weights; None if it has no `checksums.json`.

    Raises:
        CheckpointError: the file, or one that is read as a whole, has been changed.
    """
    if not (directory / FILE).exists():
        return None
    contents = read_contents(directory, is_state=False)
    contents.check_files()
    return contents


def _remedy(directory: Path, *, is_state: bool) -> str:
    if is_state:
        return (
            f"restore it from a copy, or delete {directory} to resume from the checkpoint before "
            "it, or from the start"
        )
    return "copy the checkpoint here again"

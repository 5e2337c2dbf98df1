"""Checksums of content, computed while it is written and compared while it is read.

XXH3 with 128 bits: it detects accidents (flipped bits, lost or exchanged files, edits) at the speed
of memory, and protects as little against forgery as a seal does (`storage/sealed.py`). What a
result was made from is identified by sha256 (`storage/provenance.py`), not by these.
"""

from collections.abc import Buffer
from pathlib import Path
from typing import BinaryIO

import xxhash

from megatron_idpo.errors import UserError

_BLOCK_BYTES = 1 << 20
"""Read at a time: stays in the processor's cache between reading and hashing, and is large enough
for the library to release the interpreter lock."""

CHANGED = "has been changed since it was written"


class Checksum:
    """Of content that arrives in parts."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._state = xxhash.xxh3_128()

    def update(self, content: Buffer) -> None:
        """Add the next part."""
        self._state.update(content)

    def text(self) -> str:
        """Of everything so far: 32 hexadecimal digits."""
        return self._state.hexdigest()


def checksum(content: Buffer) -> str:
    """Of content in memory: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def section_checksum(file: BinaryIO, offset: int, num_bytes: int) -> str:
    """Of a part of an open file, read in small blocks; of what there is, if the file is shorter.

    Raises:
        OSError: it cannot be read.
    """
    state, block = Checksum(), memoryview(bytearray(min(_BLOCK_BYTES, num_bytes)))
    file.seek(offset)
    while num_bytes > 0:
        count = file.readinto(block[:num_bytes])  # type: ignore[attr-defined]
        if not count:
            break
        state.update(block[:count])
        num_bytes -= count
    return state.text()


def file_checksum(path: Path) -> str:
    """Of a whole file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return section_checksum(file, 0, path.stat().st_size)


def check_file(path: Path, expected: str, *, error: type[UserError], remedy: str) -> None:
    """Compares a file with the checksum that it was written with.

    Raises:
        UserError: of class `error`; the file cannot be read, or has been changed.
    """
    with error.on_os_error(str(path), "cannot be read", remedy):
        found = file_checksum(path)
    if found != expected:
        raise error.at(str(path), CHANGED, remedy)

"""Checksums are the same however content is read, and every flipped bit changes them."""

from pathlib import Path

import pytest
import xxhash

from megatron_idpo.errors import CheckpointError, DataError
from megatron_idpo.storage import checksums
from megatron_idpo.storage.checksums import (
    Checksum,
    check_file,
    checksum,
    file_checksum,
    section_checksum,
)

CONTENT = bytes(range(256)) * 5


def test_all_ways_to_compute_it_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, of a file, of a section of a file; blocks that do not divide the size."""
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 7)
    expected = xxhash.xxh3_128(CONTENT).hexdigest()
    parts = Checksum()
    for start in range(0, len(CONTENT), 100):
        parts.update(memoryview(CONTENT)[start : start + 100])
    path = tmp_path / "x"
    path.write_bytes(b"before" + CONTENT + b"after")
    with path.open("rb", buffering=0) as file:
        assert section_checksum(file, 6, len(CONTENT)) == expected
        assert section_checksum(file, 6, 10**6) == checksum(CONTENT + b"after")
        assert section_checksum(file, 10**6, 5) == checksum(b"")
    assert parts.text() == checksum(CONTENT) == expected
    assert file_checksum(path) == checksum(path.read_bytes())


def test_changed_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    expected = file_checksum(path)
    check_file(path, expected, error=DataError, remedy="copy it")
    path.write_bytes(CONTENT[:-1] + b"\x00")
    with pytest.raises(DataError, match="x: has been changed since it was written; copy it"):
        check_file(path, expected, error=DataError, remedy="copy it")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x: cannot be read: No such file.*; copy it"):
        check_file(path, expected, error=CheckpointError, remedy="copy it")

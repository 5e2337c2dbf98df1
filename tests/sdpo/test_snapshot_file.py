"""What a snapshot says of itself, and what is told where it does not."""

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.sealed import write_sealed
from megatron_idpo.sdpo.snapshot_file import (
    FILE,
    Snapshot,
    read_snapshot,
    remedy,
    write_description,
)

from .tiny_manifest import identity

WHOLE = Snapshot(
    identity=identity("whole"),
    tensors=identity("whole"),
    base=None,
    files={"huggingface/config.json": identity("c"), "__0_0.distcp": identity("w")},
    total_bytes=123,
)
CARRIED = Snapshot(
    identity=identity("both"),
    tensors=identity("adapter"),
    base=identity("first"),
    files={"adapter/adapter_model.safetensors": identity("a")},
    total_bytes=0,
)


@pytest.mark.parametrize("snapshot", [WHOLE, CARRIED], ids=["whole", "carried"])
def test_what_is_written_is_read(tmp_path: Path, snapshot: Snapshot) -> None:
    write_description(tmp_path, snapshot)
    assert read_snapshot(tmp_path) == snapshot
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"snapshot\.json: cannot be read: No such") as raised:
        read_snapshot(tmp_path)
    assert raised.value.problems[0].remedy == remedy(tmp_path)
    assert f"copy {tmp_path} back" in str(raised.value)


@pytest.mark.parametrize("at", [0.05, 0.35, 0.65, 0.95])
def test_a_byte_that_changed_is_told(tmp_path: Path, at: float) -> None:
    write_description(tmp_path, WHOLE)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"snapshot\.json: has been changed.*; copy "):
        read_snapshot(tmp_path)


def test_another_version_is_told(tmp_path: Path) -> None:
    write_sealed(tmp_path / FILE, {"format": 2, **asdict(WHOLE), "new": 1})
    with pytest.raises(CheckpointError, match=r"snapshot\.json: .*another version.*; go on with"):
        read_snapshot(tmp_path)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"snapshot\.json: cannot be written"):
        write_description(tmp_path / "missing", WHOLE)

"""What a snapshot says of itself, and what is told where it does not."""

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_idpo.checkpoint.snapshot_metadata import (
    FILE,
    Snapshot,
    check_digests,
    check_names,
    files_below,
    read_snapshot,
    remedy,
    whole_snapshot,
    write_description,
)
from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.provenance import file_digest
from megatron_idpo.storage.sealed import write_sealed

from ..sdpo.tiny_manifest import identity

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
def test_a_byte_that_changed_is_reported(tmp_path: Path, at: float) -> None:
    write_description(tmp_path, WHOLE)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"snapshot\.json: has been changed.*; copy "):
        read_snapshot(tmp_path)


def test_another_version_is_reported(tmp_path: Path) -> None:
    write_sealed(tmp_path / FILE, {"format": 2, **asdict(WHOLE), "new": 1})
    with pytest.raises(CheckpointError, match=r"snapshot\.json: .*another version.*; go on with"):
        read_snapshot(tmp_path)


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"snapshot\.json: cannot be written"):
        write_description(tmp_path / "missing", WHOLE)


def with_files(directory: Path) -> Path:
    """A directory with the files that `WHOLE` lists."""
    for name in WHOLE.files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    write_description(directory, WHOLE)
    return directory


def test_files_are_those_that_were_written(tmp_path: Path) -> None:
    check_names(with_files(tmp_path), WHOLE)
    assert files_below(tmp_path) == sorted(WHOLE.files)


@pytest.mark.parametrize("name", WHOLE.files)
def test_a_lost_file_is_named(tmp_path: Path, name: str) -> None:
    (with_files(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: is missing; copy "):
        check_names(tmp_path, WHOLE)


@pytest.mark.parametrize("name", ["__1_0.distcp", "huggingface/.hidden", "huggingface/x.json"])
def test_an_added_file_is_named(tmp_path: Path, name: str) -> None:
    (with_files(tmp_path) / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: is none of the files that snapshot\.json"):
        check_names(tmp_path, WHOLE)


def test_a_dangling_link_is_a_file(tmp_path: Path) -> None:
    (with_files(tmp_path) / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link: is none of the files"):
        check_names(tmp_path, WHOLE)


def test_another_hash_is_named(tmp_path: Path) -> None:
    digests = list(WHOLE.files.values())
    check_digests(tmp_path, WHOLE, digests)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has been changed"):
        check_digests(tmp_path, WHOLE, [digests[0], identity("x")])


def test_a_files_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(CheckpointError, match=r"x: cannot be read: No such file.*; make it read"):
        file_digest(tmp_path / "x")


def test_a_model_that_is_a_snapshot(tmp_path: Path) -> None:
    assert whole_snapshot(tmp_path) is None
    write_description(tmp_path, WHOLE)
    assert whole_snapshot(tmp_path) == WHOLE


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_description(tmp_path, CARRIED)
    message = (
        rf"is an adapter for the first model.*name the first model, and {tmp_path}/adapter in l"
    )
    with pytest.raises(CheckpointError, match=message):
        whole_snapshot(tmp_path)

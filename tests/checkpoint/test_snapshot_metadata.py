"""`snapshot.json`: round trip, damage, and the check of the listed files."""

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
def test_snapshot_round_trips(tmp_path: Path, snapshot: Snapshot) -> None:
    write_description(tmp_path, snapshot)
    assert read_snapshot(tmp_path) == snapshot
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"snapshot\.json: cannot be read: No such") as raised:
        read_snapshot(tmp_path)
    assert raised.value.problems[0].remedy == remedy(tmp_path)
    assert f"restore {tmp_path} from a backup" in str(raised.value)


@pytest.mark.parametrize("at", [0.05, 0.35, 0.65, 0.95])
def test_changed_byte_is_reported(tmp_path: Path, at: float) -> None:
    write_description(tmp_path, WHOLE)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"snapshot\.json: has been changed.*; restore "):
        read_snapshot(tmp_path)


def test_other_version_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / FILE, {"format": 2, **asdict(WHOLE), "new": 1})
    with pytest.raises(CheckpointError, match=r"another version.*; use that version"):
        read_snapshot(tmp_path)


def test_unwritable_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"snapshot\.json: cannot be written"):
        write_description(tmp_path / "missing", WHOLE)


def with_files(directory: Path) -> Path:
    """A directory with the files that `WHOLE` lists."""
    for name in WHOLE.files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    write_description(directory, WHOLE)
    return directory


def test_listed_files_are_accepted(tmp_path: Path) -> None:
    check_names(with_files(tmp_path), WHOLE)
    assert files_below(tmp_path) == sorted(WHOLE.files)


@pytest.mark.parametrize("name", WHOLE.files)
def test_missing_listed_file_is_named(tmp_path: Path, name: str) -> None:
    (with_files(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: is missing; restore "):
        check_names(tmp_path, WHOLE)


@pytest.mark.parametrize("name", ["__1_0.distcp", "huggingface/.hidden", "huggingface/x.json"])
def test_added_file_is_named(tmp_path: Path, name: str) -> None:
    (with_files(tmp_path) / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: is not listed in snapshot\.json"):
        check_names(tmp_path, WHOLE)


def test_broken_link_counts_as_a_file(tmp_path: Path) -> None:
    (with_files(tmp_path) / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link: is not listed"):
        check_names(tmp_path, WHOLE)


def test_other_hash_is_reported(tmp_path: Path) -> None:
    digests = list(WHOLE.files.values())
    check_digests(tmp_path, WHOLE, digests)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has been changed"):
        check_digests(tmp_path, WHOLE, [digests[0], identity("x")])


def test_snapshot_of_a_model_is_recognized(tmp_path: Path) -> None:
    assert whole_snapshot(tmp_path) is None
    write_description(tmp_path, WHOLE)
    assert whole_snapshot(tmp_path) == WHOLE


def test_snapshot_of_an_adapter_is_refused(tmp_path: Path) -> None:
    write_description(tmp_path, CARRIED)
    message = (
        rf"is an adapter for the first model.*name the first model, and {tmp_path}/adapter in l"
    )
    with pytest.raises(CheckpointError, match=message):
        whole_snapshot(tmp_path)

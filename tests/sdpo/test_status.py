"""`sdpo status`: states, the next action, and detection of changed files."""

import hashlib
from pathlib import Path

import pytest

from megatron_idpo.checkpoint.snapshot_metadata import Snapshot, write_description
from megatron_idpo.cli.main import main as cli
from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError, ConfigError
from megatron_idpo.sdpo.manifest import FILE, Manifest, snapshot_directory, write_manifest
from megatron_idpo.sdpo.status import (
    describe_next,
    existing_snapshots,
    format_snapshot,
    identity_lines,
    main,
    verify_snapshot,
)

from .tiny_manifest import identity, manifest, record

WEIGHTS = b"some weights"


def write_snapshot(root: Path, number: int) -> Path:
    directory = snapshot_directory(root, number)
    (directory / "sub").mkdir(parents=True)
    contents = {"sub/config.json": b"{}", "weights": WEIGHTS}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    whole = identity(f"snapshot{number}")
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    snapshot = Snapshot(identity=whole, tensors=whole, base=None, files=hashes, total_bytes=14)
    write_description(directory, snapshot)
    return directory


def write_run(root: Path, now: Manifest) -> Path:
    """A run's directory with its snapshots."""
    root.mkdir(exist_ok=True)
    write_manifest(root, now)
    for number in existing_snapshots(now):
        write_snapshot(root, number)
    return root


def listing(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


STEP_2 = "step 2 trains on 2,000 pairs; reference: snapshot snapshot1000 of step 1; start: "
NEXT: dict[str, tuple[Manifest, list[str], str]] = {
    # manifest, existing directories, text
    "nothing begun": (
        manifest("pending", "pending"),
        [],
        "step 1 trains on 1,000 pairs from its start",
    ),
    "step 1 killed before a checkpoint": (
        manifest("training", "pending"),
        ["step-1/checkpoints/.step-00000004.incomplete-ab", "step-1/checkpoints/step-4"],
        "step 1 trains on 1,000 pairs from its start",
    ),
    "step 1 killed after one": (
        manifest("training", "pending"),
        ["step-1/checkpoints/step-00000990", "step-1/checkpoints/step-00001000"],
        "step 1 resumes from its optimizer step 1,000",
    ),
    "checkpoints of very many steps": (
        manifest("training"),
        ["step-1/checkpoints/step-99999999", "step-1/checkpoints/step-100000000"],
        "step 1 resumes from its optimizer step 100,000,000",
    ),
    "between steps": (manifest("complete", "pending"), [], f"{STEP_2}the same snapshot"),
    "between steps, from the first model": (
        manifest("complete", "pending", target="first"),
        [],
        f"{STEP_2}the first model",
    ),
    "step 2 killed before a checkpoint": (
        manifest("complete", "training"),
        ["step-1/checkpoints/step-00000007"],
        f"{STEP_2}the same snapshot",
    ),
    "step 2 killed after one": (
        manifest("complete", "training"),
        ["step-2/checkpoints/step-00000007"],
        "step 2 resumes from its optimizer step 7",
    ),
    "a checkpoint of another run": (
        manifest("complete", "pending"),
        ["step-2/checkpoints/step-00000007"],
        f"{STEP_2}the same snapshot",
    ),
    "all complete": (
        manifest("complete", "complete"),
        ["step-2/checkpoints/step-00000007"],
        "nothing, every step is complete",
    ),
}


@pytest.mark.parametrize(("now", "existing", "text"), NEXT.values(), ids=NEXT)
def test_next_action(tmp_path: Path, now: Manifest, existing: list[str], text: str) -> None:
    for name in existing:
        (tmp_path / name).mkdir(parents=True)
    assert describe_next(tmp_path, now) == text


def test_starts_and_references_are_shown_by_identity() -> None:
    now = manifest("complete", "training", "pending").with_step(2, layout={"context": 1})
    assert identity_lines(now) == [
        "first model model0000000 (some/model); target previous, adapters merge",
        "step 1: starts from model0000000, reference model0000000, layout tensor 2, pipeline 1, "
        "snapshot snapshot1000 (269.0 MB)",
        "step 2: starts from snapshot1000, reference snapshot1000, layout –, snapshot none yet",
    ]
    assert identity_lines(manifest("pending", adapters=None, target="first")) == [
        "first model model0000000 (some/model); target first"
    ]
    assert format_snapshot(record(1, "complete", is_removed=True)).endswith("(269.0 MB), removed")


def test_existing_snapshots() -> None:
    now = manifest("complete", "complete", "training").with_step(1, is_removed=True)
    assert existing_snapshots(now) == [2]


@pytest.mark.parametrize("check", [False, True])
def test_status_changes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    now = manifest("complete", "complete", "pending").with_step(1, is_removed=True)
    root = write_run(tmp_path / "run", now)
    before = listing(root)
    assert main(root, check=check) == 0
    text = capsys.readouterr().out
    assert listing(root) == before
    assert "0.75 [0.60, 0.86]" in text
    for line in (*identity_lines(now), f"next: {describe_next(root, now)}"):
        assert line in text.splitlines()
    checked = [line for line in text.splitlines() if "every byte" in line]
    assert checked == ["step 2: snapshot verified, every byte is unchanged"] * check


def test_brackets_in_a_path_are_not_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(write_run(tmp_path, manifest("pending", model="a[bold]b")), check=False)
    assert "(a[bold]b)" in capsys.readouterr().out


def test_changed_byte_of_a_snapshot_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = snapshot_directory(root, 1) / "weights"
    for at in range(len(WEIGHTS)):
        path.write_bytes(WEIGHTS[:at] + bytes([WEIGHTS[at] ^ 1]) + WEIGHTS[at + 1 :])
        with pytest.raises(CheckpointError, match=r"step-1/weights: has been changed.*; restore "):
            main(root, check=True)
    assert main(root, check=False) == 0
    path.write_bytes(WEIGHTS)
    assert main(root, check=True) == 0


def test_changed_snapshot_description_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = snapshot_directory(root, 1) / "snapshot.json"
    path.write_bytes(path.read_bytes().replace(b"weights", b"Weights"))
    with pytest.raises(CheckpointError, match=r"step-1/snapshot\.json: has been changed"):
        main(root, check=True)


def test_missing_file_or_snapshot_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    directory = snapshot_directory(root, 1)
    (directory / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"step-1/weights: is missing; restore "):
        main(root, check=True)
    directory.rename(directory.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"step-1/snapshot\.json: cannot be read: No such"):
        main(root, check=True)


@pytest.mark.parametrize("name", ["__9_0.distcp", "sub/vocab.json"])
def test_added_file_is_reported(tmp_path: Path, name: str) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    (snapshot_directory(root, 1) / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"step-1/{name}: is not listed in snapshot\.json; move it"
    ):
        main(root, check=True)


def test_other_snapshot_is_reported(tmp_path: Path) -> None:
    directory = write_snapshot(tmp_path, 2)
    verify_snapshot(directory, identity("snapshot2"))
    with pytest.raises(
        CheckpointError, match=r"step-2: is not the snapshot that the manifest names"
    ):
        verify_snapshot(directory, identity("snapshot1"))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_directory_without_sdpo_run_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    message = rf"{name}: is not an sDPO run: it has no manifest\.json; name the training"
    with pytest.raises(ConfigError, match=message):
        main(tmp_path / name, check=False)


def test_changed_manifest_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = root / FILE
    path.write_bytes(path.read_bytes().replace(b"complete", b"pending"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        main(root, check=False)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    assert cli(["sdpo", "status", str(root), "--check"]) == 0
    assert "next: nothing, every step is complete" in capsys.readouterr().out
    assert cli(["sdpo", "status", str(tmp_path)]) == EXIT_USER_ERROR
    assert "is not an sDPO run" in capsys.readouterr().err

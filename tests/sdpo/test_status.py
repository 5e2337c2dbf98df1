"""`sdpo status`: what is done, what is next, and what was changed; from files alone."""

import hashlib
from pathlib import Path

import pytest

from megatron_idpo.checkpoint.snapshot_metadata import Snapshot, write_description
from megatron_idpo.cli.main import main as cli
from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError, ConfigError
from megatron_idpo.sdpo.manifest import FILE, Manifest, write_manifest
from megatron_idpo.sdpo.retention import snapshot_directory
from megatron_idpo.sdpo.status import (
    check_snapshot,
    format_snapshot,
    identities,
    main,
    snapshots_there,
    what_is_next,
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
    """A run's directory with the snapshots that should be there."""
    root.mkdir(exist_ok=True)
    write_manifest(root, now)
    for number in snapshots_there(now):
        write_snapshot(root, number)
    return root


def listing(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


FROM_2 = f"step 2 is trained on 2,000 pairs; reference: step 1's snapshot {'snapshot1000'}; start: "
NEXT: dict[str, tuple[Manifest, list[str], str]] = {
    # the manifest, directories there, what is told
    "nothing begun": (
        manifest("pending", "pending"),
        [],
        "step 1 is trained on 1,000 pairs from its beginning",
    ),
    "step 1 killed before a checkpoint": (
        manifest("training", "pending"),
        ["step-1/checkpoints/.step-00000004.incomplete-ab", "step-1/checkpoints/step-4"],
        "step 1 is trained on 1,000 pairs from its beginning",
    ),
    "step 1 killed after one": (
        manifest("training", "pending"),
        ["step-1/checkpoints/step-00000990", "step-1/checkpoints/step-00001000"],
        "step 1 goes on after its optimizer step 1,000",
    ),
    "checkpoints of very many steps": (
        manifest("training"),
        ["step-1/checkpoints/step-99999999", "step-1/checkpoints/step-100000000"],
        "step 1 goes on after its optimizer step 100,000,000",
    ),
    "between steps": (manifest("complete", "pending"), [], f"{FROM_2}that"),
    "between steps, from the first model": (
        manifest("complete", "pending", target="first"),
        [],
        f"{FROM_2}the first model",
    ),
    "step 2 killed before a checkpoint": (
        manifest("complete", "training"),
        ["step-1/checkpoints/step-00000007"],
        f"{FROM_2}that",
    ),
    "step 2 killed after one": (
        manifest("complete", "training"),
        ["step-2/checkpoints/step-00000007"],
        "step 2 goes on after its optimizer step 7",
    ),
    "a checkpoint of another run": (
        manifest("complete", "pending"),
        ["step-2/checkpoints/step-00000007"],
        f"{FROM_2}that",
    ),
    "all complete": (
        manifest("complete", "complete"),
        ["step-2/checkpoints/step-00000007"],
        "nothing, every step is complete",
    ),
}


@pytest.mark.parametrize(("now", "there", "message"), NEXT.values(), ids=NEXT)
def test_what_is_next(tmp_path: Path, now: Manifest, there: list[str], message: str) -> None:
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    assert what_is_next(tmp_path, now) == message


def test_the_chain_can_be_followed() -> None:
    now = manifest("complete", "training", "pending").with_step(2, layout={"context": 1})
    assert identities(now) == [
        "first model model0000000 (some/model); target previous, adapters merge",
        "step 1: starts from model0000000, reference model0000000, layout tensor 2, pipeline 1, "
        "snapshot snapshot1000 (269.0 MB)",
        "step 2: starts from snapshot1000, reference snapshot1000, layout –, snapshot none yet",
    ]
    assert identities(manifest("pending", adapters=None, target="first")) == [
        "first model model0000000 (some/model); target first"
    ]
    assert format_snapshot(record(1, "complete", is_removed=True)).endswith("(269.0 MB), removed")


def test_snapshots_that_should_be_there() -> None:
    now = manifest("complete", "complete", "training").with_step(1, is_removed=True)
    assert snapshots_there(now) == [2]


@pytest.mark.parametrize("check", [False, True])
def test_a_run_is_shown_and_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    now = manifest("complete", "complete", "pending").with_step(1, is_removed=True)
    root = write_run(tmp_path / "run", now)
    before = listing(root)
    assert main(root, check=check) == 0
    message = capsys.readouterr().out
    assert listing(root) == before
    assert "0.75 [0.60, 0.86]" in message
    for line in (*identities(now), f"next: {what_is_next(root, now)}"):
        assert line in message.splitlines()
    checked = [line for line in message.splitlines() if "every byte" in line]
    assert checked == ["step 2: every byte of its snapshot is as it was written"] * check


def test_brackets_in_a_path_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(write_run(tmp_path, manifest("pending", model="a[bold]b")), check=False)
    assert "(a[bold]b)" in capsys.readouterr().out


def test_every_changed_byte_of_a_snapshot_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = snapshot_directory(root, 1) / "weights"
    for at in range(len(WEIGHTS)):
        path.write_bytes(WEIGHTS[:at] + bytes([WEIGHTS[at] ^ 1]) + WEIGHTS[at + 1 :])
        with pytest.raises(CheckpointError, match=r"step-1/weights: has been changed.*; copy "):
            main(root, check=True)
    assert main(root, check=False) == 0
    path.write_bytes(WEIGHTS)
    assert main(root, check=True) == 0


def test_a_changed_description_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = snapshot_directory(root, 1) / "snapshot.json"
    path.write_bytes(path.read_bytes().replace(b"weights", b"Weights"))
    with pytest.raises(CheckpointError, match=r"step-1/snapshot\.json: has been changed"):
        main(root, check=True)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    directory = snapshot_directory(root, 1)
    (directory / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"step-1/weights: is missing; copy "):
        main(root, check=True)
    directory.rename(directory.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"step-1/snapshot\.json: cannot be read: No such"):
        main(root, check=True)


@pytest.mark.parametrize("name", ["__9_0.distcp", "sub/vocab.json"])
def test_what_was_added_is_named(tmp_path: Path, name: str) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    (snapshot_directory(root, 1) / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"step-1/{name}: is none of the files .*; move it"):
        main(root, check=True)


def test_another_snapshot_is_reported(tmp_path: Path) -> None:
    directory = write_snapshot(tmp_path, 2)
    check_snapshot(directory, identity("snapshot2"))
    with pytest.raises(CheckpointError, match=r"step-2: is another snapshot than the manifest"):
        check_snapshot(directory, identity("snapshot1"))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_directory_of_no_such_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    message = rf"{name}: is no run of several steps: there is no manifest\.json; name the training"
    with pytest.raises(ConfigError, match=message):
        main(tmp_path / name, check=False)


def test_a_changed_manifest_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    path = root / FILE
    path.write_bytes(path.read_bytes().replace(b"complete", b"pending"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        main(root, check=False)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "run", manifest("complete"))
    assert cli(["sdpo", "status", str(root), "--check"]) == 0
    assert "next: nothing, every step is complete" in capsys.readouterr().out
    assert cli(["sdpo", "status", str(tmp_path)]) == EXIT_USER_ERROR
    assert "is no run of several steps" in capsys.readouterr().err

"""A checkpoint directory appears complete, with its companions, or not at all."""

from pathlib import Path

import pytest

from megatron_idpo.checkpoint.model_directory import (
    companion_files,
    copy_companions,
    new_checkpoint,
)
from megatron_idpo.errors import CheckpointError


def write(target: str, companions: list[str], fail: str | None = None, **options) -> str:
    """On every rank: writes a file; returns the name of the temporary directory."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import barrier

    with new_checkpoint(Path(target), [Path(path) for path in companions], **options) as directory:
        (directory / f"part{dist.get_rank()}").write_text("x")
        if dist.get_rank() == 0:
            (directory / "metadata.json").write_text("{}")
        if fail is not None:
            barrier()  # all ranks fail after the last write
            raise CheckpointError(fail)
    return directory.name


@pytest.fixture
def companions(tmp_path: Path) -> list[str]:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\xff\r\n " + name.encode())
    return [str(tmp_path / name) for name in ("config.json", "tokenizer.json")]


@pytest.mark.distributed
def test_all_ranks_write_into_one_hidden_directory(workers, companions, tmp_path):
    target = tmp_path / "below" / "out"
    first, second = workers.run(write, 2, str(target), companions)
    assert first == second and first.startswith(".out.incomplete-")
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    names = {path.name for path in target.iterdir()}
    assert names == {"part0", "part1", "metadata.json", "huggingface"}
    for path in companion_files(target):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.distributed
def test_failing_body_leaves_the_old_directory(workers, companions, tmp_path):
    target = tmp_path / "out"
    workers.run(write, 1, str(target), companions)
    with pytest.raises(CheckpointError, match=r"^broken"):
        workers.run(write, 2, str(target), companions, "broken", overwrite=True)
    assert (target / "part0").is_file() and not (target / "part1").exists()
    assert not list(tmp_path.glob(".out*"))


def write_without_looking(target: str, companions: list[str]) -> None:
    """Ranks but the first do not ask the file system for the target before it is complete."""
    from contextlib import nullcontext
    from unittest.mock import patch

    import torch.distributed as dist

    is_first = dist.get_rank() == 0
    looked = AssertionError("looked for the target")
    with nullcontext() if is_first else patch.object(Path, "resolve", side_effect=looked):
        write(target, companions)
    assert Path(target).is_dir()


@pytest.mark.distributed
def test_other_machines_do_not_remember_that_the_target_was_absent(workers, companions, tmp_path):
    """NFS would, and the next step of sDPO would not see the snapshot."""
    workers.run(write_without_looking, 2, str(tmp_path / "out"), companions)


def wait_for_removal(target: str, companions: list[str]) -> int:
    """On every rank: fails; returns the number of leftovers when this rank may exit."""
    import time
    from unittest import mock

    from megatron_idpo.storage import atomic

    discard = atomic.discard_directory

    def slowly(directory: Path) -> None:
        time.sleep(0.2)
        discard(directory)

    try:
        with mock.patch.object(atomic, "discard_directory", slowly):
            write(target, companions, "broken")
    except CheckpointError:
        return len(atomic.leftovers(Path(target)))
    return -1


@pytest.mark.distributed
def test_no_rank_exits_before_the_directory_is_deleted(workers, companions, tmp_path):
    assert workers.run(wait_for_removal, 2, str(tmp_path / "out"), companions) == [0, 0]


@pytest.mark.distributed
def test_link_is_kept_and_its_target_replaced(workers, companions, tmp_path):
    workers.run(write, 1, str(tmp_path / "real"), companions)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    workers.run(write, 2, str(tmp_path / "link"), companions, overwrite=True)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real").is_symlink()
    assert (tmp_path / "real" / "part1").is_file()


@pytest.mark.distributed
def test_too_small_disk_is_reported(workers, companions, tmp_path):
    with pytest.raises(CheckpointError, match=r"out: needs [\d,]{20,} bytes of disk"):
        workers.run(write, 2, str(tmp_path / "out"), companions, needed_bytes=10**18)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.distributed
def test_failed_copy_of_a_companion_is_reported(workers, companions, tmp_path):
    Path(companions[1]).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be copied \(No such file"):
        workers.run(write, 2, str(tmp_path / "out"), companions)
    assert not list(tmp_path.glob("*out*"))


def test_companions_are_listed_or_their_absence_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; name a"):
        companion_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"huggingface: there is no config\.json; put the"):
        companion_files(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"the state of an unfinished run.*`train`.*OUTPUT/hf"
    ):
        companion_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a Hugging Face directory, .*hf-to-megatron"):
        companion_files(tmp_path)
    copy_companions([tmp_path / "config.json"], tmp_path / "huggingface")
    (tmp_path / "metadata.json").touch()
    assert companion_files(tmp_path) == [tmp_path / "huggingface" / "config.json"]

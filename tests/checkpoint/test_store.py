"""Saves run in the background, one at a time; a failure is raised on all ranks."""

import resource
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_idpo.errors import CheckpointError
from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

pytestmark = pytest.mark.distributed

SHARDS = Setup(data=2, distributed=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_hf_model(tmp_path_factory.mktemp("model"), "llama", **tiny.SIZES))


@contextmanager
def blocked_writes(gate: threading.Event):
    """Blocks writing until the gate opens."""
    from megatron_idpo.checkpoint import store as checkpoints

    write = checkpoints.write_chunks

    def waiting(*arguments, **options):
        gate.wait()
        return write(*arguments, **options)

    with mock.patch.object(checkpoints, "write_chunks", waiting):
        yield


def obstruct(root: str) -> None:
    """Makes rank 0 unable to write its file."""
    for hidden in Path(root).glob(".step-*"):
        (hidden / "__0_0.distcp").mkdir(exist_ok=True)


def names(root: str) -> list[str]:
    return sorted(path.name for path in Path(root).iterdir())


def change_state_during_save(model: str, root: str):
    """Overwrites the state while a save waits for the disk; polls meanwhile."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, SHARDS)
    training.step(1)
    expected = training.state()
    checkpoints, gate, polled = Checkpoints(Path(root)), threading.Event(), []
    with blocked_writes(gate):
        polled += [checkpoints.poll(), checkpoints.wait()]
        checkpoints.save(training.chunks, training.optimizer, progress(1))
        training.forget()
        for tensor in (moment for held in training.held() for moment in held.moments().values()):
            tensor.zero_()
        polled += [checkpoints.poll(), checkpoints.latest()]
        gate.set()
        while (info := checkpoints.poll()) is None:
            pass
        polled.append(checkpoints.poll())
    assert info == checkpoints.latest() and info.step == 1
    checkpoints.load(info, training.chunks, training.optimizer)
    return polled, all(map(torch.equal, expected, training.state()))


def save_before_the_disk_is_ready(model: str, root: str) -> list[str]:
    """Saves twice in a row; returns what is logged."""
    from megatron_idpo.checkpoint import store

    training = prepare(model, Setup())
    training.step(1)
    checkpoints, gate = store.Checkpoints(Path(root)), threading.Event()
    with (
        blocked_writes(gate),
        mock.patch.object(store, "_REPORTED_S", 0.0),
        mock.patch.object(store.logger, "warning") as warning,
    ):
        checkpoints.save(training.chunks, training.optimizer, progress(1))
        gate.set()
        checkpoints.save(training.chunks, training.optimizer, progress(2))
    checkpoints.wait()
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]


def test_wait_for_an_earlier_save_is_reported(workers, model, tmp_path):
    ((message,),) = workers.run(save_before_the_disk_is_ready, 1, model, str(tmp_path))
    assert "waited 0 s for the save of step 1 to end" in message


def test_state_may_change_while_a_save_runs(workers, model, tmp_path):
    answers = workers.run(change_state_during_save, 2, model, str(tmp_path))
    assert answers == [([None] * 5, True)] * 2


def several(model: str, root: str) -> list[list[str]]:
    """Four saves, the second twice; returns the directory content after each."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    checkpoints = Checkpoints(Path(root), keep_last=1, keep_best=1, better="max")
    seen = []
    for step, score in ((1, 0.5), (2, 0.9), (2, 0.1), (3, None), (4, 0.2)):
        checkpoints.save(training.chunks, training.optimizer, progress(step), score=score)
        checkpoints.wait()
        seen.append(names(root))
    assert checkpoints.latest().step == 4
    return seen


def test_best_and_newest_are_kept(workers, model, tmp_path):
    (seen,) = workers.run(several, 1, model, str(tmp_path))
    one, two, three, four = (f"step-0000000{step}" for step in (1, 2, 3, 4))
    assert seen == [[one], [two], [two], [two, three], [two, four]]


def another_metric(model: str, root: str) -> list[str]:
    """A run ranked by loss that resumes ranked by accuracy; returns the directory content."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    for better, metric, steps in (
        ("min", "eval_loss", ((1, 0.9), (2, 0.8))),
        ("max", "eval_rewards/accuracies", ((3, 0.6), (4, 0.5), (5, None))),
    ):
        checkpoints = Checkpoints(
            Path(root), keep_last=1, keep_best=1, better=better, metric=metric
        )
        for step, score in steps:
            checkpoints.save(training.chunks, training.optimizer, progress(step), score=score)
            assert checkpoints.wait() == checkpoints.latest()
    return names(root)


def test_scores_of_another_metric_are_not_ranked(workers, model, tmp_path):
    (remaining,) = workers.run(another_metric, 1, model, str(tmp_path))
    assert remaining == ["step-00000003", "step-00000005"]


def saves_in_a_row(model: str, root: str) -> tuple[list[int], list[str]]:
    """Saves without waiting in between; the steps of which each save reports the end."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, SHARDS)
    checkpoints = Checkpoints(Path(root), keep_last=9)
    steps = []
    for step in range(1, 6):
        info = checkpoints.save(training.chunks, training.optimizer, progress(step))
        steps += [] if info is None else [info.step]
    checkpoints.wait()
    saved = [path for path in sorted(Path(root).iterdir()) if (path / ".metadata").is_file()]
    return steps, [path.name for path in saved]


def test_save_waits_for_the_previous_one(workers, model, tmp_path):
    for reported, remaining in workers.run(saves_in_a_row, 2, model, str(tmp_path)):
        assert reported == [1, 2, 3, 4]
        assert remaining == [f"step-0000000{step}" for step in range(1, 6)]


def content_when_named(model: str, root: str) -> tuple[list[str], list[str]]:
    """The files of a checkpoint when it gets its name, and in the end."""
    from megatron_idpo.checkpoint import store

    training, seen = prepare(model, Setup()), []
    publish = store.atomic.publish_directory

    def published(directory: Path, target: Path, **options: bool) -> None:
        seen.append(names(str(directory)))
        publish(directory, target, **options)

    checkpoints = store.Checkpoints(Path(root))
    with mock.patch.object(store.atomic, "publish_directory", published):
        checkpoints.save(training.chunks, training.optimizer, progress(1))
        checkpoints.wait()
    (when_named,) = seen
    return when_named, names(f"{root}/step-00000001")


def test_checkpoint_is_complete_when_it_gets_its_name(workers, model, tmp_path):
    """A kill after the rename leaves it as it is, and a resume would take it."""
    ((when_named, in_the_end),) = workers.run(content_when_named, 1, model, str(tmp_path))
    assert when_named == in_the_end
    assert {"progress.json", "metadata.json", "checksums.json"} < set(in_the_end)


def next_run(model: str, root: str) -> list[str]:
    """The directory content when a new run starts; loads step 2 and saves it again."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    checkpoints = Checkpoints(Path(root))
    before = names(root)
    checkpoints.load(checkpoints.latest(), training.chunks, training.optimizer)
    written = (Path(root) / "step-00000002" / ".metadata").stat().st_mtime_ns
    checkpoints.save(training.chunks, training.optimizer, progress(2))
    assert checkpoints.wait() is None
    assert (Path(root) / "step-00000002" / ".metadata").stat().st_mtime_ns == written
    return before


def test_next_run_deletes_leftovers_and_skips_the_loaded_step(workers, model, tmp_path):
    workers.run(several, 1, model, str(tmp_path))
    shutil.rmtree(tmp_path / "step-00000004")
    for name in (".step-00000009.incomplete-0a", ".step-00000001.removed-0b"):
        (tmp_path / name).mkdir()
    (remaining,) = workers.run(next_run, 1, model, str(tmp_path))
    assert remaining == ["step-00000002"]


def full_disk(model: str, root: str, when: str):
    """Rank 1's disk is full at the second save; returns the error and the remaining files."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, SHARDS)
    training.step(1)  # creates moments
    checkpoints = Checkpoints(Path(root))
    checkpoints.save(training.chunks, training.optimizer, progress(1))
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when == "written" and dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    usage = mock.Mock(free=1000) if when == "begun" else shutil.disk_usage(root)
    try:
        with mock.patch.object(shutil, "disk_usage", return_value=usage):
            checkpoints.save(training.chunks, training.optimizer, progress(2))
            checkpoints.wait()
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = (names(root), checkpoints.latest().step)
    checkpoints.save(training.chunks, training.optimizer, progress(3))
    return message, left, checkpoints.wait().step


@pytest.mark.parametrize("when", ["begun", "written"])
def test_full_disk_is_reported_on_all_ranks(workers, model, tmp_path, when):
    """Earlier checkpoints are unchanged, and the next save succeeds."""
    answers = workers.run(full_disk, 2, model, str(tmp_path), when)
    for message, left, then in answers:
        assert left == (["step-00000001"], 1)
        assert then == 3
        if when == "written":
            assert message.startswith(f"{tmp_path}/step-00000002/__1_0.distcp: tensor '")
            assert "cannot be written: File too large; raise the limit" in message
        else:
            assert f"{tmp_path}/step-00000002: needs " in message and "1,000 are free" in message
    assert answers[0][0] in answers[1][0]


def open_directory(root: str) -> None:
    from megatron_idpo.checkpoint.store import Checkpoints

    Checkpoints(Path(root))


def test_unwritable_directory_is_refused(workers, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^.*/checkpoints: cannot be written: Not a dir"):
        workers.run(open_directory, 2, str(tmp_path / "file" / "checkpoints"))


def training_fails(model: str, root: str, fail: bool) -> tuple[list[str], list[str]]:
    """Training fails while a save waits for the disk; returns the error's notes and the files."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, SHARDS)
    gate = threading.Event()
    try:
        with blocked_writes(gate), Checkpoints(Path(root)) as checkpoints:
            checkpoints.save(training.chunks, training.optimizer, progress(1))
            if fail:
                obstruct(root)
            threading.Timer(0.05, gate.set).start()
            raise ZeroDivisionError
    except ZeroDivisionError as error:
        notes = getattr(error, "__notes__", [])
    return notes, names(root)


def test_save_completes_although_training_fails(workers, model, tmp_path):
    answers = workers.run(training_fails, 2, model, str(tmp_path), False)
    assert answers == [([], ["step-00000001"])] * 2


def test_failed_save_is_a_note_of_the_training_error(workers, model, tmp_path):
    for notes, remaining in workers.run(training_fails, 2, model, str(tmp_path), True):
        (note,) = notes
        assert f"Meanwhile: {tmp_path}/step-00000001/__0_0.distcp: the first tensor cannot" in note
        assert remaining == []


def failed_at_the_end(model: str, root: str) -> None:
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    gate = threading.Event()
    with blocked_writes(gate), Checkpoints(Path(root)) as checkpoints:
        checkpoints.save(training.chunks, training.optimizer, progress(1))
        obstruct(root)
        gate.set()


def test_failed_save_is_raised_at_exit(workers, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"step-00000001/__0_0\.distcp: the first tensor"):
        workers.run(failed_at_the_end, 1, model, str(tmp_path))

"""Training's checkpoints: saved beside the training step, complete or not there, found again.

    with Checkpoints(output / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        newest = checkpoints.latest()
        if newest is not None:
            progress = checkpoints.load(newest, chunks, optimizer)
        ...
        checkpoints.save(chunks, optimizer, progress, score=loss)   # copies, then returns
        checkpoints.poll()                                          # after every step

A checkpoint is written by a thread of every rank (`background.py`) from a copy in the host's
memory, into a hidden directory that the first rank renames when all files have reached the disk;
then it deletes what need not stay (`history.py`). Whenever the processes are killed, what had its
name before is whole. The files are megatron-core's `torch_dist` ones beside a `progress.json`; what
is in them, and that any layout can read them, is said in `training_state.py` and `progress.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

from megatron_idpo.checkpoint.background_save import Background
from megatron_idpo.checkpoint.chunk_io import write_chunks
from megatron_idpo.checkpoint.metadata import Progress, Record
from megatron_idpo.checkpoint.model_directory import check_shared
from megatron_idpo.checkpoint.retention import (
    CheckpointInfo,
    Retention,
    clear_leftovers,
    complete_checkpoints,
    prune,
    target_of,
)
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.checkpoint.training_state import restore, snapshot, total_steps
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.optim.state import loss_scale_state, set_loss_scale_state
from megatron_idpo.mcore.parallel.world import (
    from_first,
    gathered,
    is_first_rank,
    raise_on_all_ranks,
)
from megatron_idpo.storage import directories as atomic


class Checkpoints:
    """The checkpoints of one run, in one directory that all ranks share.

    Every method is collective unless it says otherwise. One save is under way at a time. A context
    manager: at its end, an error's too, what was being saved is complete, or known to have failed.
    Without it, call `wait` before the process groups go.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        better: Literal["min", "max"] = "min",
        metric: str | None = None,
    ) -> None:
        """Make the directory, and clear away what interrupted runs left in it.

        Args:
            directory: where the checkpoints are, one directory each.
            keep_last: how many of the newest stay, 1 or more.
            keep_best: how many of the best stay beside them, 0 or more.
            better: whether a small score is good or a large one.
            metric: what scores measure. Those of a metric of another name, which an earlier run
                saved, are not ranked; None ranks every score.

        Raises:
            CheckpointError: the directory cannot be made or written by every rank.
        """
        assert keep_last >= 1 and keep_best >= 0, (keep_last, keep_best)
        self._root = directory
        self._retention = Retention(keep_last, keep_best, better, metric)
        with raise_on_all_ranks("preparing the directory of checkpoints"):
            if is_first_rank():
                _make(directory)
                clear_leftovers(directory)
        with raise_on_all_ranks("looking at the directory of checkpoints"):
            check_shared(directory, directory)
        self._background = Background()
        self._saving: CheckpointInfo | None = None
        self._saved_step: int | None = None

    def __enter__(self) -> Self:
        """The checkpoints themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the save that is under way, each rank for itself.

        Raises:
            CheckpointError: it could not be written; a note of another error, if there is one.
        """
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Meanwhile: {failed}")

    def latest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint, the same on all ranks.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        return max(self._complete(), key=lambda one: one.step, default=None)

    def best(self) -> CheckpointInfo | None:
        """The complete checkpoint with the best score, the newer of equals.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        return next(iter(self._retention.ranked(self._complete())), None)

    def save(
        self, chunks: list[Any], optimizer: Any, progress: Progress, *, score: float | None = None
    ) -> None:
        """Copy the state and start writing it. A step that this run has saved is not saved again.

        Waits for an earlier save that is still being written.

        Args:
            chunks: this rank's model chunks, bare or wrapped.
            optimizer: megatron-core's, of these chunks, between two steps.
            progress: the same on every rank.
            score: what the checkpoint is ranked by; the same on every rank.

        Raises:
            CheckpointError: the directory cannot be written or its disk is full; what an earlier
                save failed with.
        """
        self.wait()
        if self._saved_step == progress.step:
            return
        boxes = snapshot(chunks, optimizer)
        record = Record(
            progress=progress,
            score=score,
            metric=self._retention.metric,
            optimizer_steps=total_steps(optimizer),
            loss_scale=loss_scale_state(optimizer),
        )
        target = target_of(self._root, progress.step)
        directory = self._begin(target, boxes)
        self._saving = CheckpointInfo(target, progress.step, score, record.metric)
        self._background.start(lambda: self._write(boxes, record, directory, target))

    def poll(self) -> CheckpointInfo | None:
        """The checkpoint that has become complete since the last call, if one has.

        Cheap: one number is reduced over the CPU while a checkpoint is being written, else nothing.

        Raises:
            CheckpointError: on every rank; the checkpoint could not be written. Those before it are
                as they were.
        """
        return self._published() if self._ended(self._background.poll) else None

    def wait(self) -> CheckpointInfo | None:
        """Wait until the checkpoint that is being written is complete, and return it.

        Without a collective of training's own, so also in the middle of a step that broke off.

        Raises:
            CheckpointError: as `poll`.
        """
        return self._published() if self._ended(self._background.wait) else None

    def load(self, info: CheckpointInfo, chunks: list[Any], optimizer: Any) -> Progress:
        """Fill everything that learns, and the optimizer, from a checkpoint of any layout.

        Args:
            info: what `latest` or `best` gave.
            chunks: this rank's model chunks, bare or wrapped, with the base model's weights.
            optimizer: megatron-core's, of these chunks.

        Raises:
            CheckpointError: on every rank; the checkpoint is of another model or trains something
                else, or a file is missing, truncated or damaged.
        """
        with raise_on_all_ranks("reading the checkpoint's progress"):
            record = Record.read(info.directory)
        restore(chunks, optimizer, info.directory, steps=record.optimizer_steps)
        if record.loss_scale is not None:
            set_loss_scale_state(optimizer, record.loss_scale)
        self._saved_step = info.step
        return record.progress

    def _complete(self) -> list[CheckpointInfo]:
        found: list[CheckpointInfo] = []
        with raise_on_all_ranks("looking for checkpoints"):
            if is_first_rank():
                found = complete_checkpoints(self._root)
        return from_first(lambda: found)

    def _begin(self, target: Path, boxes: list[TensorChunk]) -> Path:
        """A hidden directory for all ranks to write into, with room for what is coming."""
        needed_bytes = sum(gathered(sum(box.tensor.nbytes for box in boxes)))
        token = from_first(lambda: uuid4().hex[:8])
        with raise_on_all_ranks("preparing the checkpoint's directory"):
            if is_first_rank():
                atomic.begin(target, token, overwrite=True, needed_bytes=needed_bytes)
        directory = atomic.incomplete_directory(target, token)
        with raise_on_all_ranks("looking at the checkpoint's directory"):
            check_shared(directory, target)
        return directory

    def _write(
        self, boxes: list[TensorChunk], record: Record, directory: Path, target: Path
    ) -> None:
        """On the thread of every rank: write, publish, prune."""
        try:
            write_chunks(boxes, directory, self._background.group, location=target)
            if is_first_rank():
                record.write(directory)
                _write_marker(directory)
                atomic.publish(directory, target, overwrite=True)
        except BaseException:
            if is_first_rank():
                atomic.discard(directory)
            raise
        if is_first_rank():
            prune(self._root, self._retention)

    def _ended(self, ask: Callable[[], bool]) -> bool:
        try:
            return ask()
        except BaseException:
            self._saving = None
            raise

    def _published(self) -> CheckpointInfo:
        info, self._saving = self._saving, None
        assert info is not None
        self._saved_step = info.step
        return info


def _make(directory: Path) -> None:
    """The directory exists, and something can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError.at(
            str(directory),
            f"cannot be written: {error.strerror}",
            "name another output directory, or make this one writable",
        ) from error


def _write_marker(directory: Path) -> None:
    """`metadata.json`, by which megatron-core knows its own format."""
    path = directory / "metadata.json"
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise CheckpointError.at(str(path), f"cannot be written: {error.strerror}") from error

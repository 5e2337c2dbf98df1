"""Checkpoints of a training run: saved in the background, complete or absent, found by a new run.

    with Checkpoints(output / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        newest = checkpoints.latest()
        if newest is not None:
            progress = checkpoints.load(newest, model_chunks, optimizer)
        ...
        checkpoints.save(model_chunks, optimizer, progress, score=loss)   # copies, then returns
        checkpoints.poll()                                                # after every step

A thread on every rank (`background_save.py`) writes a copy of the state from CPU memory into a
hidden directory. Rank 0 renames it when all files are on the disk, then deletes checkpoints that
are no longer kept (`retention.py`). A kill at any moment leaves every named checkpoint complete.
The files are megatron-core's `torch_dist` files, a `progress.json` and a `checksums.json`;
`training_state.py`, `metadata.py` and `contents.py` describe their content.
"""

import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Literal, Self

from megatron_idpo.checkpoint.background_save import BackgroundWorker
from megatron_idpo.checkpoint.contents import Contents, read_contents, write_contents
from megatron_idpo.checkpoint.dcp_planner import write_chunks
from megatron_idpo.checkpoint.metadata import FILE as PROGRESS
from megatron_idpo.checkpoint.metadata import Progress, Record
from megatron_idpo.checkpoint.model_directory import begin_together, check_shared
from megatron_idpo.checkpoint.retention import (
    CheckpointInfo,
    Retention,
    checkpoint_directory,
    clear_leftovers,
    complete_checkpoints,
    prune,
)
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.checkpoint.training_state import copy_state, restore_state, total_steps
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.optim.state import loss_scaler_state, set_loss_scaler_state
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    broadcast_from_rank0,
    is_rank0,
    raise_on_all_ranks,
    read_on_rank0,
)
from megatron_idpo.storage import atomic

logger = logging.getLogger(__name__)

_REPORTED_S = 1.0
"""Shorter waits for an earlier save are not reported."""


class Checkpoints:
    """The checkpoints of one run, in one directory that all ranks share.

    Every method is collective unless it says otherwise. One save runs at a time. As a context
    manager, it waits at the end for the save that is running, also after an error. Without it, call
    `wait` before the process groups are destroyed.
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
        """Creates the directory and deletes what interrupted runs left in it.

        Args:
            directory: of the checkpoints, each of which has a subdirectory.
            keep_last: number of the newest to keep, 1 or more.
            keep_best: number of the best to keep in addition, 0 or more.
            better: whether a low or a high score is better.
            metric: name of the metric that scores measure. Scores of another metric, saved by an
                earlier run, are not ranked; None ranks every score.

        Raises:
            CheckpointError: the directory cannot be created or written by every rank.
        """
        assert keep_last >= 1 and keep_best >= 0, (keep_last, keep_best)
        self._root = directory
        self._retention = Retention(keep_last, keep_best, better, metric)
        with raise_on_all_ranks("preparing the checkpoint directory"):
            if is_rank0():
                _create(directory)
                clear_leftovers(directory)
        with raise_on_all_ranks("checking the checkpoint directory"):
            check_shared(directory, directory)
        self._worker = BackgroundWorker()
        self._saving: CheckpointInfo | None = None
        self._saved_step: int | None = None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the save that is running. Not collective.

        Raises:
            CheckpointError: the save failed; added as a note to another error, if there is one.
        """
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Meanwhile: {failed}")

    def latest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint, the same on all ranks; None if there is none.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        checkpoints: list[CheckpointInfo] = []
        with raise_on_all_ranks("looking for checkpoints"):
            if is_rank0():
                checkpoints = complete_checkpoints(self._root)
        return broadcast_from_rank0(lambda: checkpoints[-1] if checkpoints else None)

    def save(
        self,
        model_chunks: list[Any],
        optimizer: Any,
        progress: Progress,
        *,
        score: float | None = None,
    ) -> CheckpointInfo | None:
        """Copies the state and starts writing it. A step that was saved or loaded is skipped.

        Waits for an earlier save that is still running.

        Returns:
            The checkpoint of the earlier save, if it was still running.

        Args:
            model_chunks: of this rank, bare or wrapped.
            optimizer: megatron-core's, of these model chunks, between two steps.
            progress: the same on every rank.
            score: value of the metric to rank the checkpoint by; the same on every rank.

        Raises:
            CheckpointError: the directory cannot be written or its disk is full; an earlier save
                failed.
        """
        earlier = self._wait_for_earlier_save()
        if self._saved_step == progress.step:
            return earlier
        chunks = copy_state(model_chunks, optimizer)
        record = Record(
            progress=progress,
            score=score,
            metric=self._retention.metric,
            optimizer_steps=total_steps(optimizer),
            loss_scale=loss_scaler_state(optimizer),
        )
        target = checkpoint_directory(self._root, progress.step)
        num_bytes = sum(chunk.tensor.nbytes for chunk in chunks)
        directory = begin_together(
            target, marker=PROGRESS, overwrite=True, needed_bytes=sum(all_gather_objects(num_bytes))
        )
        self._saving = CheckpointInfo(target, progress.step, score, record.metric)
        self._worker.start(lambda: self._write(chunks, record, directory, target))
        return earlier

    def poll(self) -> CheckpointInfo | None:
        """The checkpoint that was completed since the last call, if any.

        Cheap: while a save runs, one integer is reduced; otherwise nothing.

        Raises:
            CheckpointError: on every rank; the checkpoint could not be written. Earlier checkpoints
                are unchanged.
        """
        return self._completed(self._worker.poll())

    def wait(self) -> CheckpointInfo | None:
        """Waits until the save that is running is complete, and returns the checkpoint.

        Not collective over training's process groups, so it is safe in a step that failed.

        Raises:
            CheckpointError: as `poll`.
        """
        return self._completed(self._worker.wait())

    def load(self, info: CheckpointInfo, model_chunks: list[Any], optimizer: Any) -> Progress:
        """Fills all trained tensors and the optimizer from a checkpoint of any layout.

        Args:
            info: result of `latest`.
            model_chunks: of this rank, bare or wrapped, with the base model's weights.
            optimizer: megatron-core's, of these model chunks.

        Raises:
            CheckpointError: on every rank; the checkpoint is of another model or trains other
                tensors; a file is missing or has been changed, or is another checkpoint's.
        """

        def read() -> tuple[Contents, Record]:
            contents = read_contents(info.directory, is_state=True)
            contents.check_files()
            return contents, Record.read(info.directory)

        contents, record = read_on_rank0("reading the checkpoint's progress", read)
        restore_state(model_chunks, optimizer, contents, steps=record.optimizer_steps)
        if record.loss_scale is not None:
            set_loss_scaler_state(optimizer, record.loss_scale)
        self._saved_step = info.step
        return record.progress

    def _wait_for_earlier_save(self) -> CheckpointInfo | None:
        start_s = time.monotonic()
        earlier = self.wait()
        waited_s = time.monotonic() - start_s
        if earlier is not None and is_rank0() and waited_s >= _REPORTED_S:
            logger.warning(
                "training waited %.0f s for the save of step %d to end before the next one; raise "
                "checkpoint.every_steps, or use a faster disk",
                waited_s,
                self._saved_step,
            )
        return earlier

    def _write(
        self, chunks: list[TensorChunk], record: Record, directory: Path, target: Path
    ) -> None:
        """On the thread of every rank: writes, publishes, prunes."""
        try:
            pieces = write_chunks(chunks, directory, self._worker.group, location=target)
            if is_rank0():
                record.write(directory)
                _write_marker(directory)
                write_contents(directory, pieces, target=target)
                atomic.publish_directory(directory, target, overwrite=True)
        except BaseException:
            if is_rank0():
                atomic.discard_directory(directory)
            raise
        if is_rank0():
            prune(self._root, self._retention)

    def _completed(self, has_ended: bool) -> CheckpointInfo | None:
        if not has_ended:
            return None
        assert self._saving is not None
        self._saved_step = self._saving.step
        return self._saving


def _create(directory: Path) -> None:
    """Creates the directory and checks that a file can be written into it."""
    with CheckpointError.on_os_error(
        str(directory),
        "cannot be written",
        "name another output directory, or make this one writable",
    ):
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass


def _write_marker(directory: Path) -> None:
    """Writes `metadata.json`, from which megatron-core recognizes its format."""
    path = directory / "metadata.json"
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    with CheckpointError.on_os_error(str(path), "cannot be written"):
        path.write_text(json.dumps(content), encoding="utf-8")

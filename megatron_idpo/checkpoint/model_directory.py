"""The directory of a model checkpoint, which appears complete or not at all.

    OUTPUT/
      metadata.json .metadata __*.distcp   megatron-core's `torch_dist` files, any layout
      huggingface/                         config.json, generation config, tokenizer

All ranks write into a hidden directory next to it (`storage/atomic.py`), which rank 0 renames.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from megatron_idpo.checkpoint.metadata import FILE as PROGRESS
from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.mcore.parallel.world import (
    barrier,
    broadcast_from_rank0,
    is_rank0,
    raise_on_all_ranks,
)
from megatron_idpo.storage import atomic

COMPANIONS = "huggingface"
"""Subdirectory of configuration and tokenizer, which are needed to convert back."""


@contextmanager
def new_checkpoint(
    target: Path, companions: Sequence[Path], *, overwrite: bool = False, needed_bytes: int = 0
) -> Iterator[Path]:
    """A directory for all ranks to write a checkpoint into; renamed to `target` at the end.

    Collective. The body may contain collectives. If it raises, the directory is deleted; a
    `UserError` must be raised by every rank (`raise_on_all_ranks`), because all wait until the
    directory is deleted.

    Args:
        target: the checkpoint.
        companions: files to copy into `huggingface/`.
        overwrite: whether to replace `target` if it is a checkpoint already.
        needed_bytes: lower bound of what is going to be written.

    Raises:
        CheckpointError: the target cannot be written.
    """
    with new_directory(
        target, marker="metadata.json", overwrite=overwrite, needed_bytes=needed_bytes
    ) as directory:
        yield directory
        with raise_on_all_ranks("copying the configuration and the tokenizer"):
            if is_rank0():
                copy_companions(companions, directory / COMPANIONS)


@contextmanager
def new_directory(
    target: Path, *, marker: str, overwrite: bool = False, needed_bytes: int = 0
) -> Iterator[Path]:
    """A directory for all ranks to write into; renamed to `target` at the end.

    Collective; the body as in `new_checkpoint`.

    Args:
        target: the final name.
        marker: a file that every directory of this kind has; no other directory is replaced.
        overwrite: whether to replace `target` if it is such a directory already.
        needed_bytes: lower bound of what is going to be written.

    Raises:
        CheckpointError: the target cannot be written.
    """
    # A link is kept, the directory that it points to is replaced. Only rank 0 looks: NFS would
    # remember on other machines that the target is absent, also when it is complete.
    target = broadcast_from_rank0(target.resolve)
    directory = begin_together(
        target, marker=marker, overwrite=overwrite, needed_bytes=needed_bytes
    )
    with _deleted_on_error(directory):
        yield directory
        with raise_on_all_ranks("finishing the checkpoint"):
            if is_rank0():
                atomic.publish_directory(directory, target, overwrite=overwrite)
    barrier()


def begin_together(target: Path, *, marker: str, overwrite: bool, needed_bytes: int) -> Path:
    """Creates the incomplete directory of `target` for all ranks. Collective; see `new_directory`.

    Raises:
        CheckpointError: on every rank; the target cannot be written by all of them.
    """
    token = broadcast_from_rank0(lambda: uuid4().hex[:8])
    directory = atomic.incomplete_directory(target, token)
    with _deleted_on_error(directory):
        with raise_on_all_ranks("preparing the checkpoint's directory"):
            if is_rank0():
                atomic.check_replaceable(target, [marker], "a checkpoint")
                atomic.begin_directory(
                    target, token, overwrite=overwrite, needed_bytes=needed_bytes
                )
        with raise_on_all_ranks("checking the checkpoint's directory"):
            check_shared(directory, target)
    return directory


@contextmanager
def _deleted_on_error(directory: Path) -> Iterator[None]:
    """Deletes the directory if the block raises. Collective after a `UserError`."""
    try:
        yield
    except BaseException as error:
        if is_rank0():
            atomic.discard_directory(directory)
        if isinstance(error, UserError):
            barrier()  # otherwise torchrun would kill rank 0 while it still deletes
        raise


def copy_companions(companions: Sequence[Path], directory: Path) -> None:
    """Copies configuration and tokenizer files unchanged into a directory, which is created.

    Raises:
        CheckpointError: a file cannot be copied.
    """
    try:
        directory.mkdir(exist_ok=True)
        for path in companions:
            shutil.copyfile(path, directory / path.name)
    except OSError as error:
        location, message = str(error.filename or directory), f"cannot be copied ({error.strerror})"
        raise CheckpointError.of_os_error(location, message, error) from error


def companion_files(checkpoint: Path) -> list[Path]:
    """The configuration and tokenizer files of a checkpoint.

    Raises:
        CheckpointError: there are none, or it is not such a checkpoint.
    """
    if not checkpoint.is_dir():
        message = "is a file" if checkpoint.exists() else "does not exist"
        raise CheckpointError.at(str(checkpoint), message, "name a checkpoint directory")
    if (checkpoint / "config.json").is_file() and not (checkpoint / "metadata.json").exists():
        raise CheckpointError.at(
            str(checkpoint),
            "is a Hugging Face directory, not a Megatron-Core checkpoint",
            "to convert it, use `convert hf-to-megatron`",
        )
    directory = checkpoint / COMPANIONS
    if (checkpoint / PROGRESS).is_file() and not directory.exists():
        raise CheckpointError.at(
            str(checkpoint),
            "is the state of an unfinished run, not a model",
            "start the same `train` command again: it resumes from here and exports the model to "
            "OUTPUT/hf",
        )
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    if not any(path.name == "config.json" for path in files):
        raise CheckpointError.at(
            str(directory),
            "there is no config.json",
            "put the Hugging Face config.json and tokenizer files of this model there",
        )
    return files


def check_shared(directory: Path, target: Path) -> None:
    """Checks that this rank can write into a directory that rank 0 has created."""
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise CheckpointError.at(
            str(target),
            "cannot be written from every node of the run",
            "name a directory on a file system that all nodes share",
        )

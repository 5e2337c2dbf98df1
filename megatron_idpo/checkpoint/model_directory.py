"""The directory of a converted or exported model checkpoint, which appears whole or not at all.

    OUTPUT/
      metadata.json .metadata __*.distcp   megatron-core's `torch_dist` files, any layout
      huggingface/                         config.json, generation config, tokenizer: the way back

All ranks write into a hidden sibling (`atomic.py`); the first gives it its name at the end.
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
    from_first,
    is_first_rank,
    raise_on_all_ranks,
)
from megatron_idpo.storage import directories as atomic

COMPANIONS = "huggingface"
"""Where the configuration and tokenizer lie inside a checkpoint."""


@contextmanager
def new_checkpoint(
    target: Path, companions: Sequence[Path], *, overwrite: bool = False, needed_bytes: int = 0
) -> Iterator[Path]:
    """A directory for all ranks to write a checkpoint into; it gets its name if all goes well.

    Collective. The body may contain collectives; what it raises removes the directory again. If
    that is a `UserError`, every rank must raise it (`raise_on_all_ranks`): all wait for removal.

    Args:
        target: the checkpoint's name.
        companions: files to carry along in `huggingface/`.
        overwrite: whether `target` may be a checkpoint already, which is then replaced.
        needed_bytes: how much will be written, as far as known.

    Raises:
        CheckpointError: the target cannot be written.
    """
    with new_directory(
        target, marker="metadata.json", overwrite=overwrite, needed_bytes=needed_bytes
    ) as directory:
        yield directory
        with raise_on_all_ranks("copying the configuration and the tokenizer"):
            if is_first_rank():
                copy_companions(companions, directory / COMPANIONS)


@contextmanager
def new_directory(
    target: Path, *, marker: str, overwrite: bool = False, needed_bytes: int = 0
) -> Iterator[Path]:
    """A directory for all ranks to write into; it gets its name if all goes well.

    Collective; the body as `new_checkpoint`'s.

    Args:
        target: its name.
        marker: a file by which a directory of this kind is known; only such a one is replaced.
        overwrite: whether `target` may be one already.
        needed_bytes: how much will be written, as far as known.

    Raises:
        CheckpointError: the target cannot be written.
    """
    target = target.resolve()  # a link to a checkpoint stays, and what it points to is replaced
    token = from_first(lambda: uuid4().hex[:8])
    directory = atomic.incomplete_directory(target, token)
    try:
        with raise_on_all_ranks("preparing the checkpoint's directory"):
            if is_first_rank():
                _check_replaceable(target, marker)
                atomic.begin(target, token, overwrite=overwrite, needed_bytes=needed_bytes)
        with raise_on_all_ranks("looking at the checkpoint's directory"):
            check_shared(directory, target)
        yield directory
        with raise_on_all_ranks("finishing the checkpoint"):
            if is_first_rank():
                atomic.publish(directory, target, overwrite=overwrite)
    except BaseException as error:
        if is_first_rank():
            atomic.discard(directory)
        if isinstance(error, UserError):
            barrier()  # or torchrun would end the first rank while it still deletes
        raise
    barrier()


def copy_companions(companions: Sequence[Path], directory: Path) -> None:
    """Copy configuration and tokenizer files, byte by byte, into a directory made for them.

    Raises:
        CheckpointError: a file cannot be copied.
    """
    try:
        directory.mkdir(exist_ok=True)
        for path in companions:
            shutil.copyfile(path, directory / path.name)
    except OSError as error:
        raise CheckpointError.at(
            str(error.filename or directory), f"cannot be copied ({error.strerror})"
        ) from error


def companion_files(checkpoint: Path) -> list[Path]:
    """The configuration and tokenizer files that a checkpoint carries.

    Raises:
        CheckpointError: it carries none, or is no such checkpoint.
    """
    if not checkpoint.is_dir():
        what = "is a file" if checkpoint.exists() else "does not exist"
        raise CheckpointError.at(str(checkpoint), what, "name a checkpoint's directory")
    if (checkpoint / "config.json").is_file() and not (checkpoint / "metadata.json").exists():
        raise CheckpointError.at(
            str(checkpoint),
            "is a Hugging Face directory, no Megatron-Core checkpoint",
            "the other way is `convert hf-to-megatron`",
        )
    directory = checkpoint / COMPANIONS
    if (checkpoint / PROGRESS).is_file() and not directory.exists():
        raise CheckpointError.at(
            str(checkpoint),
            "is a state that a run goes on from, not a model",
            "the run that made it exports its model: the same `train` command goes on from here, "
            "and leaves OUTPUT/hf at its end",
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
    """What the first rank has made, this one can write into."""
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise CheckpointError.at(
            str(target),
            "cannot be written from every machine of the run",
            "name a directory on a file system that all of them share",
        )


def _check_replaceable(target: Path, marker: str) -> None:
    """What is replaced is a checkpoint, not somebody's home directory."""
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise CheckpointError.at(
            str(target),
            f"exists and holds something else than a checkpoint (no {marker})",
            "name another directory",
        )

"""Files and directories that appear under their name complete, or not at all.

A file is written under a hidden name next to its target, flushed to the disk and renamed
(`atomic_file` and the `write_*` functions). A directory is filled under the hidden name
`.NAME.incomplete-TOKEN`; `publish_directory` flushes everything below it and renames it. A process
that is killed at any moment leaves the old content or the new content under the name, never a part
of it.

A directory that exists is replaced by exchanging the two names in one system call where the system
supports that (Linux), else by two renames; between the two, the old directory is
`.NAME.replaced-TOKEN` and `clear_leftovers` restores it.

Nothing here is collective: one process calls.
"""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Buffer, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_idpo.errors import CheckpointError

_INCOMPLETE = "incomplete"
_REPLACED = "replaced"
_REMOVED = "removed"
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


@contextmanager
def atomic_file(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` when the block ends.

    If the block raises, `path` is unchanged and the temporary file is deleted. A file that a killed
    process leaves behind is overwritten by the next write.

    Args:
        path: the target; replaced if it exists. Its directory must exist.
        concurrent: whether several processes may write the target at once. Each then uses its own
            temporary file, and the last one to finish wins.

    Raises:
        OSError: the system refuses.
    """
    token = f"-{uuid4().hex[:8]}" if concurrent else ""
    temporary = path.with_name(f".{path.name}.{_INCOMPLETE}{token}")
    try:
        yield temporary
        # The content must reach the disk before the name does: after a power loss the new name
        # could otherwise point to an empty file.
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: Path, content: Buffer, *, concurrent: bool = False) -> None:
    """Writes a file in one step; see `atomic_file`.

    Raises:
        OSError: the system refuses.
    """
    with atomic_file(path, concurrent=concurrent) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, concurrent: bool = False) -> None:
    """Writes a text file (UTF-8, line breaks as given) in one step; see `atomic_file`.

    Raises:
        OSError: the system refuses.
    """
    write_bytes(path, text.encode("utf-8"), concurrent=concurrent)


def write_json(
    path: Path, values: Any, *, indent: int | None = 1, concurrent: bool = False
) -> None:
    """Writes a JSON file in one step; see `atomic_file`.

    Raises:
        OSError: the system refuses.
        ValueError: a value is NaN or infinite.
    """
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", concurrent=concurrent)


def append_bytes(path: Path, content: bytes, *, fsync: bool = True) -> None:
    """Appends to a file, which is created if needed; the content is on the disk on return.

    One unbuffered write, so a process that is killed leaves at most one incomplete record.

    Args:
        path: the file.
        content: whole records, for example lines of JSON.
        fsync: False leaves the flush to the system, for records that may be lost in a power
            failure: waiting for the disk can take seconds while a checkpoint is being written.

    Raises:
        OSError: the system refuses; a part of `content` may have been written.
    """
    with path.open("ab", buffering=0) as file:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fsync:
            os.fsync(file.fileno())


def truncate_file(path: Path, size_bytes: int) -> None:
    """Truncates a file; on the disk on return. A file of that size is not touched.

    Raises:
        OSError: the system refuses.
    """
    if path.stat().st_size != size_bytes:
        with path.open("r+b") as file:
            file.truncate(size_bytes)
            os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on the disk.

    Raises:
        OSError: the system refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def incomplete_directory(target: Path, token: str) -> Path:
    """The hidden directory that is filled for `target`; equal on all processes with this token."""
    return target.parent / f".{target.name}.{_INCOMPLETE}-{token}"


def leftovers(target: Path) -> list[Path]:
    """Hidden directories of interrupted work on `target`, or of work that is running now."""
    prefixes = tuple(f".{target.name}.{kind}-" for kind in (_INCOMPLETE, _REPLACED, _REMOVED))
    try:
        siblings = sorted(target.parent.iterdir())
    except OSError:
        return []
    return [path for path in siblings if path.name.startswith(prefixes)]


def clear_leftovers(target: Path) -> None:
    """Deletes what interrupted work on `target` left; no process may be writing it.

    If a replacement was interrupted between its two renames, the old directory is restored.
    """
    for path in leftovers(target):
        if f".{_REPLACED}-" in path.name and not target.exists():
            with suppress(OSError):  # retried by the next call
                path.rename(target)
        else:
            discard_directory(path)


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Checks that `target` can be published later, before hours of work instead of after them.

    Raises:
        CheckpointError: it is a file, a mount point or holds the working directory; or it is not
            empty and `overwrite` is False.
    """
    location = str(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError.at(location, "is a file", "name a directory that does not exist")
    is_mount = os.path.ismount(target)
    if is_mount or (target.is_dir() and Path.cwd().is_relative_to(target.resolve())):
        reason = "is a mount point" if is_mount else "holds the working directory"
        raise CheckpointError.at(
            location, f"{reason} and cannot be replaced", "name a new directory inside it"
        )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError.at(
            location, "exists and is not empty", "name another directory, or pass --overwrite"
        )


def check_replaceable(target: Path, markers: Sequence[str], kind: str) -> None:
    """Checks that `target`, if it has content, is a directory that may be deleted.

    Args:
        target: the directory.
        markers: files of which a replaceable directory has at least one.
        kind: name of such a directory, for the message.

    Raises:
        CheckpointError: it has none of them.
    """
    if target.is_dir() and any(target.iterdir()):
        if not any((target / marker).is_file() for marker in markers):
            message = f"exists and is not {kind} (no {' or '.join(markers)})"
            remedy = "delete it yourself, or name another directory"
            raise CheckpointError.at(str(target), message, remedy)


def check_apart(source: Path, target: Path) -> None:
    """Checks that replacing `target` does not remove `source`: it is neither it nor inside it.

    Raises:
        CheckpointError: it is.
    """
    read, replaced = source.resolve(), target.resolve()
    if read.is_relative_to(replaced):
        relation = "is the source itself" if read == replaced else f"holds the source {source}"
        raise CheckpointError.at(str(target), relation, "name another directory to write")


def delete_directory(directory: Path) -> None:
    """Deletes a directory, which is renamed first: a kill leaves no part of it under its name.

    Files that cannot be deleted now (NFS, open in another process) stay in the hidden directory
    `.NAME.removed-TOKEN` until `clear_leftovers`.

    Raises:
        OSError: it cannot be renamed.
    """
    removed = directory.with_name(f".{directory.name}.{_REMOVED}-{uuid4().hex[:8]}")
    directory.rename(removed)
    discard_directory(removed)


def begin_directory(
    target: Path, token: str, *, overwrite: bool = False, needed_bytes: int = 0
) -> Path:
    """Creates the incomplete directory of `target`, and the parents of both.

    Args:
        target: the final name.
        token: identifies this attempt; shared by the processes that take part.
        overwrite: whether `target` may be a directory with content, which is to be replaced.
        needed_bytes: lower bound of what is going to be written.

    Raises:
        CheckpointError: `target` cannot be used, or there is not enough disk space.
    """
    check_target(target, overwrite=overwrite)
    directory = incomplete_directory(target, token)
    with CheckpointError.on_os_error(str(target), "cannot be created"):
        target.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < needed_bytes:
            raise CheckpointError.at(
                str(target),
                f"needs {needed_bytes:,} bytes of disk, {free_bytes:,} are free",
                _free_space_remedy(target),
            )
        directory.mkdir()
    return directory


def publish_directory(directory: Path, target: Path, *, overwrite: bool = False) -> None:
    """Renames the finished directory to `target`, after everything in it is on the disk.

    Raises:
        CheckpointError: `target` has been filled meanwhile, or the system refuses; `directory`
            still exists then.
    """
    check_target(target, overwrite=overwrite)
    with CheckpointError.on_os_error(str(target), f"cannot be renamed from {directory.name}"):
        _fsync_tree(directory)
        if target.is_dir() and any(target.iterdir()):
            _replace(directory, target)
        else:
            directory.rename(target)
        fsync_path(target.parent)


def discard_directory(directory: Path) -> None:
    """Deletes an incomplete directory; files that cannot be deleted stay as a leftover."""
    shutil.rmtree(directory, ignore_errors=True)


def _replace(directory: Path, target: Path) -> None:
    """Renames `directory` to `target` and deletes the previous content of `target`."""
    replaced = target.parent / directory.name.replace(f".{_INCOMPLETE}-", f".{_REPLACED}-")
    if _exchange(directory, target):
        directory.rename(replaced)
    else:
        target.rename(replaced)
        directory.rename(target)
    discard_directory(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one system call; False where it is not supported."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _fsync_tree(directory: Path) -> None:
    """Waits until every file and directory below `directory`, and itself, is on the disk."""
    for parent, _, files in directory.walk(top_down=False):
        for name in files:
            fsync_path(parent / name)
        fsync_path(parent)


def _free_space_remedy(target: Path) -> str:
    names = [str(path) for path in leftovers(target)]
    if not names:
        return "free some, or name a directory on another disk"
    return f"free some; unless a process is still writing there, delete {', '.join(names)}"

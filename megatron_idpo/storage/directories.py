"""A directory that appears under its name whole, or not at all.

Work goes on in a hidden sibling, `.NAME.incomplete-TOKEN`; `publish` renames it once everything has
reached the disk. Whatever stops the work, a kill included, the name never shows half of it. An
existing directory is replaced by exchanging the two names in one step where the system can do that
(Linux), else by two renames, between which the old one is found as `.NAME.replaced-TOKEN`.

Files within a directory are the caller's; so is agreement between processes (one of them calls).
"""

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_idpo.errors import CheckpointError

_INCOMPLETE = "incomplete"
_REPLACED = "replaced"
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


def incomplete_directory(target: Path, token: str) -> Path:
    """Where the work for `target` goes on; the same for all processes that share the token."""
    return target.parent / f".{target.name}.{_INCOMPLETE}-{token}"


def leftovers(target: Path) -> list[Path]:
    """What interrupted work for `target` left behind (or what is being worked on right now)."""
    kinds = (_INCOMPLETE, _REPLACED)
    try:
        siblings = sorted(target.parent.iterdir())
    except OSError:
        return []
    prefixes = tuple(f".{target.name}.{kind}-" for kind in kinds)
    return [path for path in siblings if path.name.startswith(prefixes)]


def clear_leftovers(target: Path) -> None:
    """Delete what interrupted work for `target` left behind; nobody may be working on it.

    Where a replacement was cut off between two renames, what was to be replaced comes back.
    """
    for path in leftovers(target):
        if f".{_REPLACED}-" in path.name and not target.exists():
            with suppress(OSError):  # the next time, then
                path.rename(target)
        else:
            discard(path)


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """`target` can be published later on; asked before hours of work rather than after them.

    Raises:
        CheckpointError: it is a file or a mount point, or holds something and is not to be
            overwritten.
    """
    location = str(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError.at(location, "is a file", "name a directory that does not exist")
    is_mount = os.path.ismount(target)
    if is_mount or (target.is_dir() and Path.cwd().is_relative_to(target.resolve())):
        what = "is a mount point" if is_mount else "holds the working directory"
        raise CheckpointError.at(
            location, f"{what} and cannot be replaced", "name a new directory inside it"
        )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError.at(
            location, "exists and is not empty", "name another, or pass --overwrite"
        )


def check_apart(source: Path, target: Path) -> None:
    """Replacing `target` would not remove what is read: `source` is not it and not in it.

    Raises:
        CheckpointError: it is.
    """
    read, replaced = source.resolve(), target.resolve()
    if read.is_relative_to(replaced):
        relation = "is the source itself" if read == replaced else f"holds the source {source}"
        raise CheckpointError.at(str(target), relation, "name another directory to write")


def begin(target: Path, token: str, *, overwrite: bool = False, needed_bytes: int = 0) -> Path:
    """Creates the incomplete directory, and the parents of `target`.

    Args:
        target: the final name.
        token: what tells this attempt from others, shared by the processes that take part.
        overwrite: whether `target` may hold something that is to be replaced.
        needed_bytes: how much is going to be written, as far as known.

    Raises:
        CheckpointError: `target` cannot be used, or there is not enough space for it.
    """
    check_target(target, overwrite=overwrite)
    directory = incomplete_directory(target, token)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < needed_bytes:
            raise CheckpointError.at(
                str(target),
                f"needs {needed_bytes:,} bytes of disk, {free_bytes:,} are free",
                _delete_leftovers(target),
            )
        directory.mkdir()
    except OSError as error:
        raise CheckpointError.at(str(target), f"cannot be created: {error.strerror}") from None
    return directory


def publish(directory: Path, target: Path, *, overwrite: bool = False) -> None:
    """Gives the finished directory its name, after making sure that its files are on the disk.

    Raises:
        CheckpointError: `target` has been filled meanwhile, or the system refuses; `directory` is
            still there then.
    """
    check_target(target, overwrite=overwrite)
    try:
        _sync_tree(directory)
        if target.is_dir() and any(target.iterdir()):
            _replace(directory, target)
        else:
            directory.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError.at(
            str(target), f"cannot be renamed from {directory.name}: {error.strerror}"
        ) from None


def discard(directory: Path) -> None:
    """Removes an incomplete directory; what cannot be removed stays as a leftover."""
    shutil.rmtree(directory, ignore_errors=True)


def _replace(directory: Path, target: Path) -> None:
    """Puts `directory` in the place of `target` and removes what was there."""
    replaced = target.parent / directory.name.replace(f".{_INCOMPLETE}-", f".{_REPLACED}-")
    if _exchange(directory, target):
        directory.rename(replaced)
    else:
        target.rename(replaced)
        directory.rename(target)
    discard(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def _sync_tree(directory: Path) -> None:
    """Everything below `directory` reaches the disk."""
    for parent, _, files in directory.walk(top_down=False):
        for name in files:
            _sync(parent / name)
        _sync(parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_leftovers(target: Path) -> str:
    """A remedy for a full disk."""
    names = [str(path) for path in leftovers(target)]
    if not names:
        return "free some, or name a directory on another disk"
    return f"free some; unless something is still writing there, delete {', '.join(names)}"

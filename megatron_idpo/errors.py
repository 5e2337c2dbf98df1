"""Errors that a user can fix, one class for each thing that a user controls.

Each message has the location, the offending value and a remedy, so that no traceback is needed. The
command line prints it on one rank and exits with `EXIT_USER_ERROR`. `assert` is for our own
invariants, never for a user's input.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

_MAX_LISTED = 50
"""Problems in one message: 30,000 bad values of one field are one mistake."""

_MAX_REPEATED = 80
"""Characters of a remedy that is written again for each problem."""

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 3
"""Another process of the run has died, or does not answer; its own message says why, if it printed
one. Also that the storage of one machine fails. A restart may help, perhaps without the machine."""
LOST_PEER_NOTE = "heartbeats: "
"""Begin of the note with which the watchdog names the lost process to an error."""

EXIT_PREEMPTED = 75
"""Stopped by SIGTERM or SIGUSR1 after saving; the same command resumes. The value is BSD's
EX_TEMPFAIL, "try again later"."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: its location, what is wrong, and the remedy."""

    location: str
    """`layout.tensor`, `pairs.jsonl:17`, or the name of a file."""

    message: str
    """What is wrong, with the offending value."""

    remedy: str = ""
    """What to do; empty only if the message already says so."""

    def __str__(self) -> str:
        """`location: message; remedy` on one line."""
        reason = f"{self.location}: {self.message}"
        return f"{reason}; {self.remedy}" if self.remedy else reason


class UserError(Exception):
    """Base class of errors that the user can fix."""

    exit_code = EXIT_USER_ERROR
    """Of the command line; an instance may have another one."""

    problems: tuple[Problem, ...] = ()
    """The problems, for callers that report them with their own locations."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """An error with these problems: one line for one problem, a list for several.

        A long remedy, such as all names of the sections, is in the list once.
        """
        assert problems, "an error needs a problem"
        listed, remedies = [], set[str]()
        for problem in problems[:_MAX_LISTED]:
            if problem.remedy in remedies and len(problem.remedy) > _MAX_REPEATED:
                problem = replace(problem, remedy="as above")
            remedies.add(problem.remedy)
            listed.append(f"  - {problem}")
        lines = [f"{len(problems)} problems:", *listed]
        if len(problems) > _MAX_LISTED:
            lines.append(f"  - and {len(problems) - _MAX_LISTED} more")
        error = cls(str(problems[0]) if len(problems) == 1 else "\n".join(lines))
        error.problems = tuple(problems)
        return error

    @classmethod
    def at(cls, location: str, message: str, remedy: str = "") -> Self:
        """An error with one problem."""
        return cls.of([Problem(location, message, remedy)])

    @classmethod
    def of_os_error(cls, location: str, message: str, error: OSError, remedy: str = "") -> Self:
        """This error for a failed system call, with its remedy and its exit code.

        Args:
            location: of the problem.
            message: what failed, and why.
            error: as raised.
            remedy: as for `on_os_error`.
        """
        raised = cls.at(location, message, os_remedy(error, remedy))
        raised.exit_code = os_exit_code(error, raised.exit_code)
        return raised

    @classmethod
    @contextmanager
    def on_os_error(cls, location: str, message: str, remedy: str = "") -> Iterator[None]:
        """Turns an `OSError` of the block into this error: `message`, then the system's reason.

        Args:
            location: of the problem.
            message: what failed.
            remedy: if `os_remedy` does not know a better one for the system's reason, such as a
                missing file.
        """
        try:
            yield
        except OSError as error:
            reason = f"{message}: {error.strerror or error}"
            raise cls.of_os_error(location, reason, error, remedy) from None


_SPACE = "free some space, or name a path on another file system"
_PERMISSIONS = "change the permissions, or name another path"
_STORAGE = "the storage fails: check it, or name a path on another one"
_OPEN_FILES = "raise the limit of open files (`ulimit -n 4096`)"

OS_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "name a path on a file system that can be written",
    errno.EIO: _STORAGE,
    errno.EREMOTEIO: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.ENOMEM: "raise the limit of memory (`ulimit -v unlimited`), or use a larger machine",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f unlimited`)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "correct the symbolic link, which points to itself",
}
"""What helps, by the system's error number, wherever a file is read or written."""


_STORAGE_FAULTS = {errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT}
"""Of a disk, or of one machine's connection to shared storage."""


def os_exit_code(error: OSError, code: int = EXIT_USER_ERROR) -> int:
    """The exit code of a failed system call: after a fault of the storage a restart may help.

    Args:
        error: as raised.
        code: for other reasons.
    """
    return EXIT_PEER_LOST if error.errno in _STORAGE_FAULTS else code


def os_remedy(error: OSError, remedy: str = "") -> str:
    """The remedy for a failed system call, which depends on its reason.

    Args:
        error: as raised.
        remedy: for reasons that are not in `OS_REMEDIES`.
    """
    return OS_REMEDIES.get(error.errno or 0, remedy)


def library_reason(error: Exception) -> str:
    """Why a library cannot load a model's files, for a message on one line.

    Transformers advises to trust a repository's code; it is never run here.
    """
    if "trust_remote_code" in str(error):
        return "it needs Python code from its repository, which is never run"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def os_problem(error: OSError) -> Problem | None:
    """A failed system call as a problem of this machine; None if it is none of `OS_REMEDIES`."""
    if error.errno not in OS_REMEDIES:
        return None
    location = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "system"
    return Problem(location, os.strerror(error.errno), os_remedy(error))


class ConfigError(UserError, ValueError):
    """The configuration, the command line or the parallel layout cannot work."""


class OutputLockedError(ConfigError):
    """A process that is probably lost still holds the output; the same command works later."""

    exit_code = EXIT_PREEMPTED


class DataError(UserError, ValueError):
    """A preference record, a tokenizer or a data file cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint, ours or Hugging Face's, cannot be read or written."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue: a NaN loss, or policy and reference that differ at the start."""

"""Errors that a user can fix, one class for each thing that a user controls.

Each message has the location, the offending value and a remedy, so that no traceback is needed. The
command line prints it on one rank and exits with `EXIT_USER_ERROR`. `assert` is for our own
invariants, never for a user's input.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 3
"""Another process of the run has died; its own message says why, if it printed one."""
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

    problems: tuple[Problem, ...] = ()
    """The problems, for callers that report them with their own locations."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """An error with these problems: one line for one problem, a list for several."""
        assert problems, "an error needs a problem"
        lines = [f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]
        error = cls(str(problems[0]) if len(problems) == 1 else "\n".join(lines))
        error.problems = tuple(problems)
        return error

    @classmethod
    def at(cls, location: str, message: str, remedy: str = "") -> Self:
        """An error with one problem."""
        return cls.of([Problem(location, message, remedy)])

    @classmethod
    @contextmanager
    def on_os_error(cls, location: str, message: str, remedy: str = "") -> Iterator[None]:
        """Turns an `OSError` of the block into this error: `message`, then the system's reason."""
        try:
            yield
        except OSError as error:
            raise cls.at(location, f"{message}: {error.strerror or error}", remedy) from None


class ConfigError(UserError, ValueError):
    """The configuration, the command line or the parallel layout cannot work."""


class DataError(UserError, ValueError):
    """A preference record, a tokenizer or a data file cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint, ours or Hugging Face's, cannot be read or written."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue: a NaN loss, or policy and reference that differ at the start."""

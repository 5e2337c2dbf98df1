"""What a user is told when something they gave us cannot work.

A kind for each thing a user controls: the configuration, the data, the checkpoints, and the course
that training takes with them.
Each message carries the offending value, its place and the remedy, so that nobody has to read a
traceback. The command line prints them on one rank and exits with `EXIT_USER_ERROR`; `assert` is
for our own invariants and never for a user's mistake.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 3
"""Another process of the run has died; its own message says why, if it could give one."""
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM or SIGUSR1 with everything saved: start the same command again. The number is
BSD's EX_TEMPFAIL, "try again later"."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what is wrong there, and what would put it right."""

    location: str
    """What the user can point at: `layout.tensor`, a shard's file name, `pairs.jsonl:17`."""

    message: str
    """What is wrong, with the offending value."""

    remedy: str = ""
    """What to do about it; empty only where the message already says so."""

    def __str__(self) -> str:
        """`place: message; remedy` on one line."""
        reason = f"{self.location}: {self.message}"
        return f"{reason}; {self.remedy}" if self.remedy else reason


class UserError(Exception):
    """The base of everything that is the user's to mend."""

    problems: tuple[Problem, ...] = ()
    """What `of` and `at` were given, for whoever tells it with places of their own."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """All problems in one error: a line if there is one, a list if there are several."""
        assert problems, "an error needs a problem"
        lines = [f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]
        error = cls(str(problems[0]) if len(problems) == 1 else "\n".join(lines))
        error.problems = tuple(problems)
        return error

    @classmethod
    def at(cls, location: str, message: str, remedy: str = "") -> Self:
        """One problem, raised where it is found."""
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
    """Training cannot go on: a loss is no number, or policy and reference do not start equal."""

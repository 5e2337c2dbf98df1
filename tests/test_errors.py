"""Messages and base classes of user errors."""

import errno
import os
import pickle

import pytest

from megatron_idpo.errors import (
    EXIT_PEER_LOST,
    EXIT_USER_ERROR,
    CheckpointError,
    ConfigError,
    DataError,
    Problem,
    UserError,
    library_reason,
    os_problem,
)

KINDS = [ConfigError, DataError, CheckpointError]
FIRST = Problem("layout.tensor", "3 does not divide 8 heads", "take 1, 2, 4 or 8")
SECOND = Problem("pairs.jsonl:17", "is empty")


def test_a_problem_is_one_line() -> None:
    assert str(FIRST) == "layout.tensor: 3 does not divide 8 heads; take 1, 2, 4 or 8"
    assert str(SECOND) == "pairs.jsonl:17: is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_one_problem_is_a_line_and_several_are_a_list(kind: type[UserError]) -> None:
    assert str(kind.of([FIRST])) == str(FIRST)
    assert str(kind.of([FIRST, SECOND])) == f"2 problems:\n  - {FIRST}\n  - {SECOND}"


def test_a_message_lists_a_bounded_number_of_problems() -> None:
    error = ConfigError.of([FIRST] * 30_000)
    assert len(error.problems) == 30_000 and str(error).startswith("30000 problems:")
    assert str(error).count("\n") == 51 and str(error).endswith("\n  - and 29950 more")


@pytest.mark.parametrize("kind", KINDS)
def test_at_creates_an_error_of_its_class(kind: type[UserError]) -> None:
    error = kind.at("pairs.jsonl:17", "is empty")
    assert type(error) is kind and str(error) == str(SECOND)
    assert str(kind.at(FIRST.location, FIRST.message, FIRST.remedy)) == str(FIRST)


def test_an_error_needs_a_problem() -> None:
    with pytest.raises(AssertionError, match="needs a problem"):
        ConfigError.of([])


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(ConfigError, ValueError), (DataError, ValueError), (CheckpointError, RuntimeError)],
)
def test_errors_are_also_builtin_errors(kind: type[UserError], builtin: type[Exception]) -> None:
    assert issubclass(kind, UserError) and issubclass(kind, builtin)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_can_be_pickled(kind: type[UserError]) -> None:
    unpickled = pickle.loads(pickle.dumps(kind.of([FIRST, SECOND])))
    assert type(unpickled) is kind and str(unpickled) == str(kind.of([FIRST, SECOND]))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space, or name a path on another file system"),
        (errno.EDQUOT, "free some space, or name a path on another file system"),
        (errno.EACCES, "change the permissions, or name another path"),
        (errno.EPERM, "change the permissions, or name another path"),
        (errno.EROFS, "name a path on a file system that can be written"),
        (errno.EMFILE, "raise the limit of open files (`ulimit -n 4096`)"),
        (errno.ENOENT, "name it"),
    ],
)
def test_the_remedy_of_a_failed_system_call_depends_on_its_reason(code: int, remedy: str) -> None:
    reason = os.strerror(code)
    with (
        pytest.raises(DataError) as raised,
        DataError.on_os_error("x", "cannot be read", "name it"),
    ):
        raise OSError(code, reason, "x")
    assert str(raised.value) == f"x: cannot be read: {reason}; {remedy}"
    problem = os_problem(OSError(code, reason, "y"))
    assert problem == (None if code == errno.ENOENT else Problem("y", reason, remedy))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, EXIT_USER_ERROR),
        (errno.ENOENT, EXIT_USER_ERROR),
        (errno.EIO, EXIT_PEER_LOST),
        (errno.ESTALE, EXIT_PEER_LOST),
        (errno.ETIMEDOUT, EXIT_PEER_LOST),
        (errno.EREMOTEIO, EXIT_PEER_LOST),
    ],
)
def test_after_a_fault_of_the_storage_a_restart_may_help(number: int, code: int) -> None:
    with pytest.raises(DataError) as raised, DataError.on_os_error("x", "cannot be read"):
        raise OSError(number, os.strerror(number), "x")
    assert raised.value.exit_code == code
    assert pickle.loads(pickle.dumps(raised.value)).exit_code == code


def test_the_reason_of_a_library_is_one_line_without_advice_to_run_code() -> None:
    assert library_reason(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert library_reason(OSError("no\n  file")) == "OSError: no file"
    refused = library_reason(ValueError("Please pass the argument `trust_remote_code=True`"))
    assert refused == "it needs Python code from its repository, which is never run"

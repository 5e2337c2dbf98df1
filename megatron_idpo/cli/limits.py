"""Limits of this process that are too low: refused at the start, or named when they are reached.

Under a low `ulimit -n` or `ulimit -v` the libraries fail in many ways: while they are imported, in
a thread that cannot start, in C++ without an exception. What is certain to fail is refused before
they are imported.
"""

import errno
import re
import resource

from megatron_idpo.errors import OS_REMEDIES, ConfigError, UserError, os_exit_code, os_problem

MIN_OPEN_FILES = 256
"""A single-process run of a tiny model opens up to 117 at once, data sources and ranks add more."""

GOOD_OPEN_FILES = 4096
"""What the soft limit is raised to, if the hard one allows it."""

MIN_ADDRESS_SPACE_BYTES = 8 << 30
"""A run of a tiny model on a CPU reserves 5.5 GB of addresses, most of which it never touches."""

_NO_MEMORY = re.compile(
    r"can'?t allocate memory|cannot allocate memory|failed to map segment|can't start new thread"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
"""Messages of torch, of the dynamic linker and of threads."""

_MAX_SHOWN = 200
"""Characters of a library's message."""

_NO_FILES = re.compile("too many open files", re.IGNORECASE)


def check_limits() -> None:
    """Raise the soft limit of open files to the hard one, and refuse what cannot suffice.

    Raises:
        ConfigError: with the limit and the command that raises it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _is_below(hard, MIN_OPEN_FILES):
        message = f"is {hard}: too few open files, {MIN_OPEN_FILES} are needed"
        raise ConfigError.at("ulimit -n", message, OS_REMEDIES[errno.EMFILE])
    if _is_below(soft, GOOD_OPEN_FILES):
        raised = GOOD_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, GOOD_OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if _is_below(soft, MIN_ADDRESS_SPACE_BYTES):
        message = f"is {soft // 1024} KiB: too little memory, the libraries alone reserve more"
        raise ConfigError.at("ulimit -v", message, OS_REMEDIES[errno.ENOMEM])


def _is_below(limit: int, minimum: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < minimum


def limit_error(error: BaseException) -> UserError | None:
    """A failure as one that the user can fix, if the system's limits or storage caused it.

    Args:
        error: an exception that nothing has handled; also of a failed import.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (problem := os_problem(cause)):
            failure = ConfigError.of([problem])
            failure.exit_code = os_exit_code(cause)
            return failure
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, without importing torch
            return _gpu_memory_error(cause)
        if isinstance(cause, MemoryError) or _NO_MEMORY.search(str(cause)):
            return _at_limit("memory", errno.ENOMEM, cause)
        if _NO_FILES.search(str(cause)):
            return _at_limit("open files", errno.EMFILE, cause)
        cause = cause.__cause__  # not the context: it may have been handled
    return None


def _gpu_memory_error(error: BaseException) -> ConfigError:
    """torch's message is a paragraph about its allocator; its first two sentences are the facts."""
    first_line = str(error).strip().split("\n", 1)[0].removeprefix("CUDA out of memory. ")
    facts = " ".join(re.split(r"(?<=\.) (?=[A-Z])", first_line)[:2]).rstrip(".")
    return ConfigError.at(
        "GPU memory",
        f"is full: {facts[:_MAX_SHOWN]}",
        "lower data.row_tokens, set training.recompute to full, or raise layout.tensor",
    )


def _at_limit(what: str, code: int, error: BaseException) -> ConfigError:
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return ConfigError.at("system", f"not enough {what} ({reason[:_MAX_SHOWN]})", OS_REMEDIES[code])

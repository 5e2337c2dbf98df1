"""Limits the time in which a process leaves a run after an error: its heartbeats have ended."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_idpo.errors import EXIT_PEER_LOST, UserError
from megatron_idpo.mcore.watchdog.watch import EndProcess, end_with, time_limit

_LEAVE_LIMIT_S = 60.0
"""More than gloo or NCCL need to close the connections of a process that does not wait."""


@contextmanager
def leaving_after(
    error: BaseException, *, limit_s: float = _LEAVE_LIMIT_S, end_process: EndProcess = os._exit
) -> Iterator[None]:
    """End this process if the block takes longer: nothing watches over it any more.

    After an error NCCL may wait, inside C++, for collectives of a process that is lost.

    Args:
        error: of this process, which the command line would report later.
        limit_s: seconds.
        end_process: for tests.
    """
    code = 1
    if isinstance(error, UserError):
        code = error.exit_code
    elif isinstance(error, RuntimeError):  # as those of collectives
        code = EXIT_PEER_LOST

    def message() -> str:
        return (
            f"{''.join(traceback.format_exception(error))}megatron-idpo: error (rank "
            f"{os.environ.get('RANK', '0')}): after it the process groups do not close within "
            f"{limit_s:.0f} s. This process ends (exit code {code})"
        )

    with time_limit(limit_s, lambda: end_with(message, end_process, code)):
        yield

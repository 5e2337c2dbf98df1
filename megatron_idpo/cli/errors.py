"""How a failure is told: once for the run, by the first rank to fail, with an exit code that says
what kind it was.

Not here: what a failure is about; that is in its message.
"""

import os
import re
import sys
import traceback

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, UserError

EXIT_INTERRUPTED = 130
"""What a shell reports for a program ended by Ctrl-C."""

_PEER_IS_GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|pair closure|gloo::|"
    r"remote process exited|NCCL communicator was aborted|Heartbeat monitor timed out",
    re.IGNORECASE,
)
"""What gloo and NCCL say in a collective when a process at the other end has died."""


def report_user_error(error: UserError) -> int:
    """Say what the user has to mend; returns the exit code."""
    _tell(f"error{{rank}}: {error}")
    return EXIT_USER_ERROR


def report_interrupted() -> int:
    """Say that Ctrl-C has ended the program; returns the exit code."""
    _tell("interrupted; what was saved before is complete")
    return EXIT_INTERRUPTED


def report_lost_peer(error: Exception) -> int:
    """Say that a process of the run has died; returns the exit code."""
    first_line = str(error).strip().split("\n", 1)[0]
    _tell(
        "error{rank}: another process of this run has ended, so this one cannot go on "
        f"({type(error).__name__}: {first_line}); look for that one's own message above, or for "
        "the kernel's (out of memory?); what was saved before is complete"
    )
    return EXIT_PEER_LOST


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because a process at the other end has died."""
    return (
        _world_size() > 1
        and isinstance(error, RuntimeError)
        and bool(_PEER_IS_GONE.search(str(error)))
    )


def stopped_an_import_of_megatron(error: Exception) -> bool:
    """Whether the error came up while a module of megatron-core was being imported.

    megatron-core guards its optional libraries against ImportError only; a half-installed
    Transformer Engine raises others.
    """
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        code.co_name == "<module>" and "megatron/core/" in code.co_filename for code in frames
    )


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _speaks_for_the_run() -> bool:
    """Whether this process is the one that tells the run's failure: the first rank to fail.

    Usually every rank fails for the same reason, and one message is wanted; but a reason can lie
    with one rank or one node alone, and must be heard too. So neither "rank 0 only" nor "every
    rank" will do: the ranks count themselves off in the store that torchrun keeps for the run.
    Where it cannot be reached, each rank speaks, because silence would be worse.
    """
    if _world_size() == 1:
        return True
    try:
        from datetime import timedelta

        from torch.distributed import TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=3),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"megatron_idpo/failures/{attempt}", 1) == 1
    except Exception:  # whatever is wrong with the store, the user's error matters more
        return True


def _tell(message: str) -> None:
    """Print, if no other rank has; `{rank}` becomes this one's number where there are several."""
    if _speaks_for_the_run():
        rank = f" (rank {os.environ['RANK']})" if _world_size() > 1 else ""
        print(f"megatron-idpo: {message.replace('{rank}', rank)}", file=sys.stderr, flush=True)

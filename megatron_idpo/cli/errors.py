"""Reporting a failure once, from the first rank that fails; exit codes."""

import os
import re
import sys
import traceback

from megatron_idpo.errors import EXIT_PEER_LOST, LOST_PEER_NOTE, UserError

EXIT_INTERRUPTED = 130
"""The exit code of shells for a program ended by Ctrl-C."""

_LOST_PEER_MESSAGE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|pair closure|gloo::|"
    r"Connection was likely closed|"
    r"remote process exited|NCCL communicator was aborted|Heartbeat monitor timed out|"
    r"Timed out waiting|Watchdog caught collective operation timeout|tcp/(pair|unbound_buffer)\.cc",
    re.IGNORECASE,
)
"""Errors of gloo, NCCL and torch's store when a peer process has died or does not answer."""

_STORE_ERRORS = {"DistNetworkError", "DistStoreError"}
"""torch's, by name: torch is not imported here. The store of rank 0 was there when this process
joined (`mcore/parallel/world.py`), so its process is lost, or another one has not come."""

_TIMEOUT_MESSAGE = re.compile(r"Timed out (waiting|after)|(operation|wait) timeout", re.IGNORECASE)


def report_user_error(error: UserError) -> int:
    """Print an error that the user can fix; returns the exit code."""
    _print_once(f"error{{rank}}: {error}")
    return error.exit_code


def report_interrupted() -> int:
    """Print that Ctrl-C has ended the program; returns the exit code."""
    _print_once("interrupted; everything saved so far is complete")
    return EXIT_INTERRUPTED


def report_lost_peer(error: Exception) -> int:
    """Print that another process of the run is lost, once per machine; returns the exit code."""
    first_line = str(error).strip().split("\n", 1)[0]
    # The watchdog's note names the process.
    lost = "; ".join([*getattr(error, "__notes__", ()), f"{type(error).__name__}: {first_line}"])
    if _TIMEOUT_MESSAGE.search(first_line):
        happened = "has not answered within training.timeout_s"
    else:
        happened = "has died"
    _print_once(
        f"error{{rank}}: another process of this run {happened}, so this one stops ({lost}); see "
        "its message above, or that of the kernel (out of memory?); everything saved so far is "
        "complete",
        counter=f"lost/{os.environ.get('GROUP_RANK', '')}",
    )
    return EXIT_PEER_LOST


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because a peer process has died.

    An error of torch.distributed says so, or comes when the watchdog knows of a lost process.
    """
    if not isinstance(error, RuntimeError) or _world_size() == 1:
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    notes = getattr(error, "__notes__", ())
    is_noted = "DistError" in kinds and any(note.startswith(LOST_PEER_NOTE) for note in notes)
    is_named = bool(kinds & _STORE_ERRORS or _LOST_PEER_MESSAGE.search(str(error)))
    return is_noted or is_named


def is_megatron_import_error(error: Exception) -> bool:
    """Whether the error was raised while a module of megatron-core was imported.

    megatron-core catches only ImportError of its optional libraries; a half-installed Transformer
    Engine raises others.
    """
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        code.co_name == "<module>" and "megatron/core/" in code.co_filename for code in frames
    )


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _is_first_to_fail(counter: str) -> bool:
    """Whether this rank is the first one to report a failure that others may report too.

    Usually every rank fails for the same reason and one message is enough, but a failure can also
    be on one rank or node alone. So neither "rank 0 only" nor "every rank" works: each failing rank
    increments a counter in torchrun's store, and the first one prints. If the store cannot be
    reached every rank prints, because no message at all would be worse.

    Args:
        counter: of the failures of which one is reported. A lost peer has another one than an error
            of the user: a rank that fails alone is lost to the others, which are often faster.
    """
    if _world_size() == 1:
        return True
    try:
        from datetime import timedelta

        from torch.distributed import TCPStore

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=3)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # One counter per restart, so that each attempt reports its own failure.
        return store.add(f"megatron_idpo/failures/{attempt}/{counter}", 1) == 1
    except Exception:  # of any kind: the user's error matters more than that of the store
        return True


def _print_once(message: str, *, counter: str = "error") -> None:
    """Print unless another rank has; `{rank}` becomes ` (rank N)` if there are several ranks."""
    if _is_first_to_fail(counter):
        rank = f" (rank {os.environ['RANK']})" if _world_size() > 1 else ""
        print(f"megatron-idpo: {message.replace('{rank}', rank)}", file=sys.stderr, flush=True)

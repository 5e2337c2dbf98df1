"""`--processes N`: the verb in N processes on this machine, started by torchrun's own API.

Every process runs `python -m megatron_idpo` as under torchrun. An error of the user is one message,
printed by the worker; torchrun's report of the failed workers is left out. SIGTERM and SIGUSR1 are
forwarded, SIGHUP and Ctrl-C as SIGTERM: the workers save and exit. Ctrl-C again ends them at once.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError

OPTION = "--processes"
WORKER = ("-m", "megatron_idpo")
"""Arguments of Python in each process."""


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """The option."""
    meaning = "start this many processes here, as torchrun --nproc-per-node N does"
    parser.add_argument(OPTION, type=_count, metavar="N", help=meaning)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}; give a number from 1 to 1024")
    return int(text)


def without_option(words: Sequence[str]) -> list[str]:
    """The words of the command line for a worker: without `--processes N`."""
    kept: list[str] = []
    skips = False
    for word in words:
        if skips:
            skips = False
        elif word == OPTION:
            skips = True
        elif not word.startswith(f"{OPTION}="):
            kept.append(word)
    return kept


def launch(words: Sequence[str], processes: int) -> int:
    """Run the command line in several processes; returns the exit code of the first that failed.

    Args:
        words: the arguments after the program's name.
        processes: how many.

    Raises:
        ConfigError: this is a worker of torchrun already.
        KeyboardInterrupt: Ctrl-C has ended the workers, and no worker has saved its work.
    """
    if "RANK" in os.environ:
        message, remedy = "torchrun has started this process", "leave it out under torchrun"
        raise ConfigError.at(OPTION, message, remedy)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_idpo.cli.agent import SignalForwarder, exit_code, use_agent

    # The workers print their own errors; the agent would add its table of all workers.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # As torchrun: by default every process would use all cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGQUIT",
    )
    # In a terminal Ctrl-C reaches this process only: each worker has a separate session.
    with SignalForwarder({signal.SIGINT: signal.SIGTERM}) as forwarder:
        use_agent(lambda: forwarder.stop_requested)
        try:
            elastic_launch(config, sys.executable)(*WORKER, *without_option(words))
        except ChildFailedError as error:
            failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
            codes = [failure.exitcode for failure in failures]
            if signal.SIGINT in forwarder.received and EXIT_PREEMPTED not in codes:
                raise KeyboardInterrupt from None
            return exit_code(codes, stopped=forwarder.stop_requested)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0

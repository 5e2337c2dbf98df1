"""Starts the processes of a run on this machine: torchrun with exit codes for schedulers.

    python launch/node.py [torchrun's options] -m megatron_idpo train CONFIG.yaml

torchrun alone exits with 1 for every failure of its workers, kills them 30 s after a SIGTERM even
if they are still saving, and ends at a SIGUSR1 while the workers continue. This script forwards
both signals to the workers, waits until they have saved and exited with `EXIT_PREEMPTED`, and exits
with the workers' code. Options, rendezvous and the handling of dead workers are torchrun's.

With --max-restarts it starts the workers again only after a failure that a restart can help: not
after a stop, and not after an error of the user.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
from torch.distributed import DistNetworkError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import main as torchrun

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that announce a stop. torchrun handles the others."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process and return the workers' exit code."""
    forwarder = SignalForwarder()
    launcher.LocalElasticAgent = agent_type(  # type: ignore[misc]
        lambda: forwarder.stop_requested
    )
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        code = exit_code(codes, stopped=forwarder.stop_requested)
        if code not in (EXIT_PREEMPTED, EXIT_USER_ERROR):  # workers have printed the reason
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousTimeoutError:
        print(
            "node.py: fewer machines than --nnodes requires have joined within join_timeout of "
            f"--rdzv-conf; start it again when there are enough (exit code {EXIT_PREEMPTED})",
            file=sys.stderr,
        )
        return EXIT_PREEMPTED
    except RendezvousClosedError:
        print("node.py: the other machines have ended this run", file=sys.stderr)
        return EXIT_PEER_LOST
    except DistNetworkError as error:
        remedy = "check --master-addr, or choose another --master-port if another run uses this one"
        print(f"node.py: the rendezvous failed: {error}; {remedy}", file=sys.stderr)
        return 1
    return 0


def agent_type(stop_requested: Callable[[], bool]) -> type[LocalElasticAgent]:
    """torchrun's agent of a machine, which restarts only what a restart can help."""

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result: RunResult = super()._monitor_workers(worker_group)
            codes = [failure.exitcode for failure in result.failures.values()]
            final = (EXIT_PREEMPTED, EXIT_USER_ERROR)
            if codes and (stop_requested() or exit_code(codes, stopped=False) in final):
                self._remaining_restarts = 0
            return result

    return Agent


def exit_code(codes: Sequence[int], *, stopped: bool) -> int:
    """The exit code of this machine: that of the first failure, except for less informative ones.

    A user error is the most informative. A lost peer is less so, because the peer has its own code.
    The least is the SIGTERM with which torchrun ends the other workers.

    Args:
        codes: exit codes of the failed workers in order of time, negative for a signal.
        stopped: whether a stop was requested. A worker that the signal itself ended had not
            installed its handlers, so it had nothing to save.
    """
    stop_codes = {EXIT_PREEMPTED, *(-number for number in STOP_SIGNALS if stopped)}
    failed = [code for code in codes if code not in stop_codes]
    if not failed:
        return EXIT_PREEMPTED
    priority = {EXIT_USER_ERROR: 0, EXIT_PEER_LOST: 2, -signal.SIGTERM: 3}
    first = min(failed, key=lambda code: priority.get(code, 1))
    return first if first > 0 else 128 - first


class SignalForwarder:
    """Forwards stop signals to the workers.

    In a thread: Python runs signal handlers in the main thread between bytecodes, and that thread
    may be inside a C++ call that waits for other machines.
    """

    def __init__(self) -> None:
        """Install the handlers and start the thread."""
        self.stop_requested = False
        self._pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._forward, daemon=True).start()

    def _forward(self) -> None:
        while True:
            number = os.read(self._pipe, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            self.stop_requested = True
            workers = psutil.Process().children()
            if not workers:  # none started yet
                os._exit(EXIT_PREEMPTED)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

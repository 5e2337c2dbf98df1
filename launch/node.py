"""Start this machine's processes of a run: torchrun, with an exit code that a scheduler can act on.

    python launch/node.py [torchrun's options] -m megatron_idpo train CONFIG.yaml

torchrun by itself ends with 1 whatever its workers ended with; it kills them 30 s after a SIGTERM,
whether they have saved or not; and a SIGUSR1 ends it at once while they go on without it. Here both
signals go to the workers, which save and end with `EXIT_PREEMPTED` in their own time, and the
workers' exit code becomes ours. Everything else is torchrun's: its options, the rendezvous, what
becomes of the other workers of this machine when one dies.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers announce the end with; the others stay torchrun's."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun here and return the workers' exit code."""
    messenger = Messenger()
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        code = exit_code(codes, stopped=messenger.has_called)
        if code not in (EXIT_PREEMPTED, EXIT_USER_ERROR):  # these have told their reason
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    except DistNetworkError as error:
        remedy = "check --master-addr, or choose another --master-port if another run has this one"
        print(f"node.py: the rendezvous failed: {error}; {remedy}", file=sys.stderr)
        return 1
    return 0


def exit_code(codes: Sequence[int], *, stopped: bool) -> int:
    """One code for the workers that failed: the first one's, unless another says more.

    A user's mistake says most; that a peer was lost says less, since the peer has a code too; least
    says the SIGTERM by which torchrun ends the others.

    Args:
        codes: their exit codes in the order of the failures, negative for a signal.
        stopped: whether they had been asked to stop. A worker that such a signal ends had not
            begun to listen, so it had nothing to save.
    """
    answers = {EXIT_PREEMPTED, *(-number for number in STOP_SIGNALS if stopped)}
    failed = [code for code in codes if code not in answers]
    if not failed:
        return EXIT_PREEMPTED
    says_less = {EXIT_USER_ERROR: 0, EXIT_PEER_LOST: 2, -signal.SIGTERM: 3}
    first = min(failed, key=lambda code: says_less.get(code, 1))
    return first if first > 0 else 128 - first


class Messenger:
    """Hands stop signals on to the workers.

    A thread does it, because Python runs signal handlers in the main thread between bytecodes, and
    that thread may be waiting for other machines inside a C++ call.
    """

    def __init__(self) -> None:
        """Listen from now on."""
        self.has_called = False
        self._numbers, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._deliver, daemon=True).start()

    def _deliver(self) -> None:
        while True:
            number = os.read(self._numbers, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            self.has_called = True
            workers = psutil.Process().children()
            if not workers:  # nothing has begun
                os._exit(EXIT_PREEMPTED)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

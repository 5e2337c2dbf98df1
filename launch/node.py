"""Starts the processes of a run on this machine: torchrun with exit codes for schedulers.

    python launch/node.py [torchrun's options] -m megatron_idpo train CONFIG.yaml

torchrun alone exits with 1 for every failure of its workers, kills them 30 s after a SIGTERM even
if they are still saving, and ends at a SIGUSR1 while the workers continue. This script forwards
both signals to the workers (`megatron_idpo/cli/agent.py`), SIGHUP as SIGTERM unless it is ignored
(nohup), waits until they have saved and exited with `EXIT_PREEMPTED`, and exits with the workers'
code. Options, rendezvous and the handling of dead workers are torchrun's.

With --max-restarts it starts the workers again only after a failure that a restart can help: not
after a stop, and not after an error of the user.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.run import main as torchrun

from megatron_idpo.cli.agent import SignalForwarder, exit_code, use_agent
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR

EXIT_CODE_FILE = "EXIT_CODE_FILE"
"""Environment: where to write the exit code of a failure, for a scheduler that reports only one of
all machines' (`slurm.sh`)."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process and return the workers' exit code."""
    with SignalForwarder() as forwarder:
        code = _run(arguments, forwarder)
    if (file := os.environ.get(EXIT_CODE_FILE)) and code not in (0, EXIT_PREEMPTED):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(f"{code}\n")
    return code


def _run(arguments: Sequence[str], forwarder: SignalForwarder) -> int:
    use_agent(lambda: forwarder.stop_requested)
    # torchrun 2.14 keeps the store of the first round and announces it in that round only: a
    # machine that joins later waits for it for a minute, and all end. This way every round has its
    # store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGQUIT", *arguments])
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
            "node.py: not joined within join_timeout of --rdzv-conf: there are fewer machines than "
            "--nnodes requires, or the run on the others cannot use one more; start it again then "
            f"(exit code {EXIT_PREEMPTED})",
            file=sys.stderr,
        )
        return EXIT_PREEMPTED
    except RendezvousClosedError:
        print("node.py: the other machines have ended this run", file=sys.stderr)
        return EXIT_PEER_LOST
    except RendezvousError as error:
        print(
            f"node.py: the machine of --rdzv-endpoint is lost ({error}); start all again "
            f"(exit code {EXIT_PEER_LOST})",
            file=sys.stderr,
        )
        return EXIT_PEER_LOST
    except DistStoreError as error:
        came = re.search(r"(\d+)/(\d+) clients joined", str(error))
        if came is None:
            raise
        print(
            f"node.py: {came[1]} of {came[2]} machines have come; start it again when all can "
            f"(exit code {EXIT_PREEMPTED})",
            file=sys.stderr,
        )
        return EXIT_PREEMPTED
    except DistNetworkError as error:
        remedy = "check --master-addr, or choose another --master-port if another run uses this one"
        print(f"node.py: the rendezvous failed: {error}; {remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

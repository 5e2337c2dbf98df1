"""Runs of several steps that kill themselves at a call of the file system, and are started again.

Run as `python -m tests.sdpo.crash_trials CONFIG OUTPUT ANSWERS WHICH TRIALS`. Everything is
imported once; each start is a fork, so that there can be many. First an unbroken run counts its
calls of the file system below its output: between two of them nothing on the disk changes, so these
are all the moments there are. Then, for each of TRIALS of these moments, a new run is killed there
and started again until it ends. WHICH chooses among them: `all`, or `transitions` for those at the
manifest and the snapshots alone. Prints a line of JSON for the unbroken run and for each trial.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.cli.train import main as train

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""Audit events of the file system: https://docs.python.org/3/library/audit_events.html."""

_TRANSITIONS = ("manifest.json", "snapshots")
_SEED = 7


def forked(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own; how that ended: its code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def watch(output: Path, call: Callable[[str], None]) -> None:
    """From now on, hear of every call of the file system below a directory, before it happens."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and str(output) in str(arguments[0]):
            call(str(arguments[0]))

    sys.addaudithook(audit)


def unbroken(config: Path, output: Path, calls: Path) -> None:
    """The whole run; its calls go into a file."""
    heard: list[str] = []
    watch(output, heard.append)
    with redirect_stdout(StringIO()):
        code = train(config, [])
    calls.write_text(json.dumps(heard))
    assert code == 0, code


def killed(config: Path, output: Path, moment: int) -> None:
    """A run that ends at a moment."""
    left = [moment]

    def count(_: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    watch(output, count)
    with redirect_stdout(StringIO()):
        train(config, [])


def result(output: Path) -> dict[str, Any]:
    """What a run has come to: its weights to the bit, and every step's snapshot."""
    weights = hashlib.sha256()
    for path in sorted((output / "hf").glob("*.safetensors")):
        weights.update(path.read_bytes())
    steps = json.loads((output / "manifest.json").read_text())["steps"]
    return {
        "weights": weights.hexdigest(),
        "snapshots": [step["snapshot"] for step in steps],
        "references": [step["reference"] for step in steps],
        "leftovers": [str(path) for path in output.rglob("*incomplete*")],
    }


def main(config: Path, output: Path, answers: Path, which: str, trials: int) -> None:
    """The unbroken run and all trials."""
    torch.set_num_threads(1)
    import_everything()
    calls_file = answers / "calls.json"
    ended = forked(unbroken, config, output, calls_file)
    calls: list[str] = json.loads(calls_file.read_text())
    print(json.dumps({"ended": ended, "calls": len(calls), **result(output)}), flush=True)
    moments = [
        moment
        for moment, path in enumerate(calls)
        if which == "all" or any(name in path for name in _TRANSITIONS)
    ]
    for moment in sorted(random.Random(_SEED).sample(moments, trials)):
        shutil.rmtree(output)
        ended = forked(killed, config, output, moment)
        again = forked(killed, config, output, sys.maxsize)
        message = {"moment": moment, "at": calls[moment], "ended": ended, "again": again}
        print(json.dumps({**message, **result(output)}), flush=True)


def import_everything() -> None:
    """What every run needs."""
    from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu
    from megatron_idpo.mcore.megatron_warnings import quiet_megatron

    redirect_cuda_to_cpu()
    with quiet_megatron():
        import megatron_idpo.sdpo.run
        import megatron_idpo.train.loop  # noqa: F401


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))

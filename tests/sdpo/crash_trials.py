"""sDPO runs that kill themselves at a file system call and are started again.

For `WorkerPool.run_as_program`: modules are imported once and each start is a fork, so that starts
are cheap. First an uninterrupted run counts its file system calls below its output. Between two of
them nothing on the disk changes, so they cover all moments. Then, for each trial, a new run is
killed at one of the calls and started again until it ends.
"""

import hashlib
import importlib
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

from megatron_idpo.cli.train import main as train

from ..train.tiny_run import without_figures

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""Audit events of the file system: https://docs.python.org/3/library/audit_events.html."""

_TRANSITIONS = ("manifest.json", "snapshots")
_SEED = 7


def forked(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a fork; returns its exit code, or minus the signal that killed it."""
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
    """Call back before every file system call below a directory, from now on."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and str(output) in str(arguments[0]):
            call(str(arguments[0]))

    sys.addaudithook(audit)


def uninterrupted(config: Path, output: Path, calls: Path) -> None:
    """An uninterrupted run; writes its file system calls to a file."""
    paths: list[str] = []
    watch(output, paths.append)
    with redirect_stdout(StringIO()), without_figures():
        code = train(config, [])
    calls.write_text(json.dumps(paths))
    assert code == 0, code


def killed(config: Path, output: Path, moment: int) -> None:
    """A run that kills itself at a file system call."""
    remaining = [moment]

    def count(_: str) -> None:
        if remaining[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        remaining[0] -= 1

    watch(output, count)
    with redirect_stdout(StringIO()), without_figures():
        train(config, [])


def result(output: Path) -> dict[str, Any]:
    """Hash of a run's weights, and the snapshots and references of its steps."""
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


def crash_trials(config: Path, output: Path, which: str, trials: int) -> list[dict[str, Any]]:
    """Results of the uninterrupted run and of each trial.

    Args:
        config: of the run.
        output: its output directory.
        which: the calls at which runs are killed: `all`, or `transitions` for those on the manifest
            and snapshots.
        trials: how many of them.
    """
    import_everything()
    calls_file = output.with_name("calls.json")
    ended = forked(uninterrupted, config, output, calls_file)
    calls: list[str] = json.loads(calls_file.read_text())
    results = [{"ended": ended, "calls": len(calls), **result(output)}]
    moments = [
        moment
        for moment, path in enumerate(calls)
        if which == "all" or any(name in path for name in _TRANSITIONS)
    ]
    for moment in sorted(random.Random(_SEED).sample(moments, trials)):
        shutil.rmtree(output)
        ended = forked(killed, config, output, moment)
        again = forked(killed, config, output, sys.maxsize)
        trial = {"moment": moment, "at": calls[moment], "ended": ended, "again": again}
        results.append({**trial, **result(output)})
    return results


def import_everything() -> None:
    """Import before forking, also what a run imports later."""
    for module in ("accelerate", "pandas", "pyarrow.parquet", "megatron_idpo.sdpo.run"):
        importlib.import_module(module)

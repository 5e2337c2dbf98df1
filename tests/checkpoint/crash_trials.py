"""Ranks that are killed while they save a checkpoint; a new process inspects the result.

For `WorkerPool.run_as_program`: a process that has imported everything forks the ranks, so that
many trials are possible.

In step n every value of the state is n, so a checkpoint that mixes two steps is recognized.

Modes: `next` saves step 3 after step 2, keeping one; `again` saves step 2 once more with other
values; `again-without-exchange` does so on a system that cannot exchange two names. In trial k of
these, the rank kills itself at its k-th call of the file system; the first trial that it survives
is the last. `anytime` has two ranks that save repeatedly until one of them is killed.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.storage import atomic

from .tiny_training import Setup, prepare, progress

OVERWRITTEN = -1.0
"""Value of the state after a save has returned."""

SECOND_VALUE = 2.25
"""Value of the state when step 2 is saved for the second time."""

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
"""Audit events of the file system: https://docs.python.org/3/library/audit_events.html."""

IMPORTED = (
    "megatron.core.pipeline_parallel",
    "megatron_idpo.checkpoint.store",
    "megatron_idpo.convert.hf_to_megatron",
    "megatron_idpo.data.packing.rows",
    "megatron_idpo.lora.adapters",
    "megatron_idpo.plugin.attach",
    "transformers.modeling_rope_utils",
    "transformers.models.llama.configuration_llama",
)
"""Modules that every rank needs, imported before the fork."""


def state_of(training: Any) -> list[torch.Tensor]:
    """Every tensor of a checkpoint."""
    from megatron_idpo.mcore.optim.state import sharded_params

    shards = sharded_params(training.optimizer)
    moments = [tensor for shard in shards for tensor in shard.moments().values()]
    return [parameter.detach() for parameter in training.chunks[0].parameters()] + moments


def save(checkpoints: Any, training: Any, step: int, value: float) -> None:
    """Saves step `step` with every value of the state set to `value`."""
    from megatron_idpo.mcore.optim.state import set_optimizer_step

    set_optimizer_step(training.optimizer, step)
    for tensor in state_of(training):
        tensor.fill_(value)
    checkpoints.save(training.chunks, training.optimizer, progress(step))
    for tensor in state_of(training):
        tensor.fill_(OVERWRITTEN)


def die_at(call: int, directory: str) -> None:
    """Kills this process at its `call`-th file system call below a directory, from 0."""
    calls = count()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and directory in str(arguments[0]) and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def save_once(model: str, directory: str, mode: str, call: int) -> None:
    """Saves steps 1 and 2, then starts the save that is interrupted."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    checkpoints = Checkpoints(Path(directory), keep_last=1, keep_best=0)
    for step in (1, 2):
        save(checkpoints, training, step, step)
        checkpoints.wait()
    if mode != "next":
        checkpoints = Checkpoints(Path(directory), keep_last=1, keep_best=0)
    if mode == "again-without-exchange":
        mock.patch.object(atomic, "_exchange", return_value=False).start()
    die_at(call, directory)
    save(checkpoints, training, *((3, 3.0) if mode == "next" else (2, SECOND_VALUE)))
    checkpoints.wait()


def save_and_save(model: str, directory: str) -> None:
    """Saves until the process is killed."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup(data=2, distributed=True))
    checkpoints = Checkpoints(Path(directory), keep_last=1, keep_best=0)
    for step in count(1):
        save(checkpoints, training, step, step)
        while checkpoints.poll() is None:
            time.sleep(0.002)


def look(model: str, directory: str, answer: str) -> None:
    """Opens the directory like the next run; writes what it finds and whether it is complete."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    hidden = [path for path in Path(directory).iterdir() if path.name.startswith(".")]
    result: dict[str, Any] = {"left": len(hidden)}
    checkpoints = Checkpoints(Path(directory), keep_last=1, keep_best=0)
    info = checkpoints.latest()
    if info is not None:
        loaded = checkpoints.load(info, training.chunks, training.optimizer)
        values = {value for tensor in state_of(training) for value in tensor.unique().tolist()}
        result |= {"step": info.step, "loaded": loaded.step, "values": sorted(values)}
    result["names"] = sorted(path.name for path in Path(directory).iterdir())
    Path(answer).write_text(json.dumps(result))


def fork(function: Callable[..., None], rank: int, size: int, store: str, *arguments: Any) -> int:
    """Forks a process that runs a function as a rank of a world; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        where = dist.FileStore(store, size)
        dist.init_process_group("gloo", store=where, rank=rank, world_size=size)
        with suppress_megatron_warnings():
            function(*arguments)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait_for(pid: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def looked_at(model: str, root: Path, directory: Path) -> dict[str, Any]:
    """What a new process finds in the directory."""
    answer = root / "answer.json"
    pid = fork(look, 0, 1, str(root / "look"), model, str(directory), str(answer))
    ended = wait_for(pid)
    return json.loads(answer.read_text()) if ended == 0 else {"ended": ended}


def trial(model: str, root: Path, mode: str, call: int) -> dict[str, Any]:
    """The rank kills itself at a file system call."""
    directory = root / "checkpoints"
    pid = fork(save_once, 0, 1, str(root / "store"), model, str(directory), mode, call)
    ended = wait_for(pid)
    return {"call": call, "ended": ended, **looked_at(model, root, directory)}


def anytime(model: str, root: Path, seed: int) -> dict[str, Any]:
    """One of two ranks is killed some time after the first checkpoint is complete."""
    directory, chance = root / "checkpoints", random.Random(seed)
    pids = [
        fork(save_and_save, rank, 2, str(root / "store"), model, str(directory)) for rank in (0, 1)
    ]
    deadline = time.monotonic() + 100
    while not list(directory.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3 * chance.random())
    victim = chance.choice(pids)
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    ended = [wait_for(pid) for pid in pids]
    took_s = time.monotonic() - began
    return {"ended": ended, "took_s": took_s, **looked_at(model, root, directory)}


def crash_trials(
    model: str, root: Path, mode: str, first: int, stride: int, trials: int
) -> list[dict[str, Any]]:
    """The result of every trial, at most `trials`."""
    for module in IMPORTED:
        importlib.import_module(module)
    answers = []
    for index in range(first, first + trials * stride, stride):
        own = root / f"{mode}-{index}"
        own.mkdir(parents=True)
        if mode == "anytime":
            answer = anytime(model, own, index)
        else:
            answer = trial(model, own, mode, index)
        answers.append(answer)
        if answer["ended"] == 0:
            break
    return answers

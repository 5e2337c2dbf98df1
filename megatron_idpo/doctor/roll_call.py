"""`doctor --nodes` on several machines without torchrun: who comes, then a few processes on each.

torchrun waits for a missing machine for ten minutes and does not name it. Here the machines first
meet at a store of the first one, so that all of them can report which ones did not come.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_idpo.doctor.finding import Finding, State
from megatron_idpo.doctor.interfaces import check_interfaces

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_NAME = "machines"
_RESULT = "result"
_POLL_S = 0.2
_ANSWER_S = 30.0
"""How much longer the others wait for the first machine's result than it waits for them."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the machines meet; the fields are named like torchrun's options."""

    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int = 29500
    nproc_per_node: int = 2
    wait_s: float = 120.0
    """How long a machine waits for the others."""

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.nnodes * self.nproc_per_node


def meet(meeting: Meeting) -> tuple[Finding, int]:
    """Waits until all machines are here or the time is over.

    Returns:
        Who came, and a free port of the first machine for the processes.
    """
    import torch.distributed as dist

    if broken := check_interfaces(os.environ):
        return broken, 0
    address = f"{meeting.master_addr}:{meeting.master_port}"
    is_first = meeting.node_rank == 0
    try:
        store = dist.TCPStore(
            meeting.master_addr,
            meeting.master_port,
            is_master=is_first,
            timeout=timedelta(seconds=meeting.wait_s + (0 if is_first else _ANSWER_S)),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:  # DistNetworkError and DistStoreError
        return _unreachable(address, meeting, error), 0
    try:
        return _join(store, meeting)
    except RuntimeError as error:  # the first machine has ended
        return _unreachable(address, meeting, error), 0


def _join(store: "TCPStore", meeting: Meeting) -> tuple[Finding, int]:
    own = _key(meeting.node_rank)
    if store.add(f"{own}-count", 1) > 1:
        message = f"another process has come as --node-rank {meeting.node_rank}"
        remedy = "number the machines from 0, each once"
        return Finding(_NAME, State.BROKEN, message, "", remedy), 0
    store.set(own, socket.gethostname())
    if meeting.node_rank == 0:
        result = _wait_for_all(store, meeting)
        store.set(_RESULT, json.dumps(result))
        others = [f"{_key(rank)}-read" for rank in result["here"] if rank != "0"]
        if others:
            with suppress(RuntimeError):  # the others read the result before the store ends
                store.wait(others, timedelta(seconds=_ANSWER_S))
    else:
        result = json.loads(store.get(_RESULT))
        store.set(f"{own}-read", "")
    return _finding(result, meeting), int(result["port"])


def run_processes(meeting: Meeting, port: int, words: Sequence[str]) -> int:
    """Runs the verb in this machine's processes; returns the largest exit code.

    Args:
        meeting: of the machines.
        port: of the first machine, for the processes' rendezvous.
        words: the command line after the program's name.
    """
    processes = []
    for local_rank in range(meeting.nproc_per_node):
        environment = {
            "RANK": str(meeting.node_rank * meeting.nproc_per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(meeting.world_size),
            "LOCAL_WORLD_SIZE": str(meeting.nproc_per_node),
            "MASTER_ADDR": meeting.master_addr,
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_idpo", *words], env=os.environ | environment
            )
        )
    return max(process.wait() for process in processes)


def _wait_for_all(store: "TCPStore", meeting: Meeting) -> dict[str, Any]:
    end_s = time.monotonic() + meeting.wait_s
    missing = set(range(meeting.nnodes))
    while missing and time.monotonic() < end_s:
        missing = {rank for rank in missing if not store.check([_key(rank)])}
        if missing:
            time.sleep(_POLL_S)
    here = {
        str(rank): store.get(_key(rank)).decode()
        for rank in range(meeting.nnodes)
        if rank not in missing
    }
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {"here": here, "missing": sorted(missing), "port": port}


def _finding(result: dict[str, Any], meeting: Meeting) -> Finding:
    here, missing = result["here"], result["missing"]
    present = ", ".join(f"{rank} ({host})" for rank, host in here.items())
    if not missing:
        return Finding(_NAME, State.OK, f"all {meeting.nnodes} have come: {present}")
    names = ", ".join(map(str, missing))
    message = (
        f"--node-rank {names} of {meeting.nnodes} did not come within {meeting.wait_s:.0f} s; "
    )
    message += f"here: {present}"
    remedy = f"start the command there too, or check that it reaches {meeting.master_addr} at port "
    return Finding(_NAME, State.BROKEN, message, "", f"{remedy}{meeting.master_port}")


def _unreachable(address: str, meeting: Meeting, error: BaseException) -> Finding:
    reason = str(error).split("\n", 1)[0]
    if meeting.node_rank == 0:
        message, remedy = f"cannot listen at {address}: {reason}", "choose another --master-port"
        return Finding(_NAME, State.BROKEN, message, "", remedy)
    message = f"the first machine, {address}, cannot be reached: {reason}"
    remedy = "check its name, that the command runs there with --node-rank 0, and its firewall"
    return Finding(_NAME, State.BROKEN, message, "", remedy)


def _key(node_rank: int | str) -> str:
    return f"machine-{node_rank}"

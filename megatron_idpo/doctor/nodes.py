"""Whether the machines of a run can work together: `doctor --nodes`, in processes on each.

They are started by torchrun or by `roll_call.py`. Joins them as a run does, then compares versions,
measures an all-reduce and the clocks, and looks whether `training.output` is the same directory
everywhere.
"""

import math
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.doctor.finding import Finding, State
from megatron_idpo.doctor.interfaces import check_interfaces, chosen_interfaces
from megatron_idpo.errors import UserError

if TYPE_CHECKING:
    from megatron_idpo.mcore.parallel.world import World

_ALL_REDUCE_BYTES = 64 << 20
"""As a bucket of DDP."""

_ROUNDS = 5
_TIMEOUT_S = 120
"""Of the processes' rendezvous and collectives: a wrong interface or a firewall is a hang."""

_CLOCK_LIMIT_S = 10.0
"""torchrun's rendezvous takes a machine for dead whose last keep-alive is older than 15 s, by its
own clock for the time that the other machine wrote. It may be 5 s old without any difference."""

_clock_s = time.time
"""What keep-alives compare."""

_COMPARED = ("torch", "megatron-core", "transformers", "numpy")
_NETWORK = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface to use"


def check_nodes(config: RunConfig | None) -> list[Finding]:
    """Findings about all machines together, the same on every rank. Collective.

    Args:
        config: the configuration, for `training`; None: nothing about directories.
    """
    if "RANK" not in os.environ:
        remedy = "megatron-idpo doctor --nodes --nnodes 2 --node-rank RANK --master-addr FIRST_HOST"
        message = "--nodes needs the processes of all machines"
        return [Finding("rendezvous", State.BROKEN, message, "", f"start on each: {remedy}")]
    if broken := check_interfaces(os.environ):
        return [broken]
    from megatron_idpo.mcore.parallel.world import distributed_world

    start_s = time.monotonic()
    try:
        with distributed_world(config, timeout_s=_TIMEOUT_S) as world:
            return list(_findings(config, world, time.monotonic() - start_s))
    except (UserError, RuntimeError) as error:
        return [Finding("rendezvous", State.BROKEN, str(error).split("\n", 1)[0], "", _NETWORK)]


def _findings(config: RunConfig | None, world: "World", joined_s: float) -> Iterator[Finding]:
    from megatron_idpo.mcore.parallel.world import all_gather_objects
    from megatron_idpo.mcore.watchdog.link import own_addresses

    hosts = all_gather_objects(socket.gethostname())
    machines = list(dict.fromkeys(hosts))
    processes = f"{world.size} processes on {len(machines)} machines ({', '.join(machines)})"
    yield Finding("rendezvous", State.OK, f"{processes}, joined in {joined_s:.1f} s")
    interfaces = dict(zip(hosts, all_gather_objects(chosen_interfaces(os.environ)), strict=True))
    addresses = dict(zip(hosts, all_gather_objects((*own_addresses(), "none")[0]), strict=True))
    listed = ", ".join(f"{host} {address}" for host, address in addresses.items())
    is_local = any(address.startswith("127.") for address in addresses.values())
    if is_local and len(machines) > 1:
        consequence = "other machines cannot reach a loopback address"
        yield Finding("network", State.BROKEN, listed, consequence, _NETWORK)
    else:
        yield Finding("network", State.OK, listed, "", _NETWORK if len(machines) > 1 else "")
    chosen = "; ".join(f"{host}: {line}" for host, line in interfaces.items())
    yield Finding("network interfaces", State.OK, chosen)
    yield _versions(hosts)
    yield _all_reduce(world)
    yield _clocks(hosts)
    yield _gloo()
    if config is not None and config.has("training"):
        yield _shared(Path(config.training.output), hosts, world)


def _versions(hosts: list[str]) -> Finding:
    """Libraries of which results depend, and this package."""
    from megatron_idpo import __version__
    from megatron_idpo.mcore.parallel.world import all_gather_objects

    installed = [f"{name} {version(name)}" for name in _COMPARED]
    own = ", ".join(
        [f"megatron-idpo {__version__}", f"Python {sys.version.split()[0]}", *installed]
    )
    users: defaultdict[str, list[str]] = defaultdict(list)
    for host, versions in zip(hosts, all_gather_objects(own), strict=True):
        if host not in users[versions]:
            users[versions].append(host)
    if len(users) == 1:
        return Finding("versions", State.OK, f"the same everywhere: {own}")
    differences = "; ".join(f"{', '.join(names)}: {versions}" for versions, names in users.items())
    remedy = "install the same versions on all machines"
    return Finding("versions", State.BROKEN, differences, "", remedy)


def _all_reduce(world: "World") -> Finding:
    """The bandwidth that a rank sees, as nccl-tests count it."""
    import torch
    import torch.distributed as dist

    from megatron_idpo.mcore.cpu.redirect import default_device
    from megatron_idpo.mcore.parallel.world import all_gather_objects, barrier

    values = torch.zeros(_ALL_REDUCE_BYTES // 4, device=default_device())
    dist.all_reduce(values)  # connects
    barrier()
    start_s = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    slowest_s = max(all_gather_objects(time.perf_counter() - start_s)) / _ROUNDS
    moved_bytes = 2 * (world.size - 1) / world.size * _ALL_REDUCE_BYTES
    value = f"{moved_bytes / slowest_s / 1e9:.2f} GB/s ({_ALL_REDUCE_BYTES >> 20} MiB over "
    value += f"{dist.get_backend()} in {slowest_s * 1e3:.0f} ms)"
    return Finding("all-reduce", State.OK, value)


def _clocks(hosts: list[str]) -> Finding:
    """How far clocks of machines differ, bounded by the times of messages between them."""
    from megatron_idpo.mcore.parallel.world import all_gather_objects, barrier
    from megatron_idpo.mcore.watchdog.launch_notes import Launch

    earliest_s, latest_s = [-math.inf] * len(hosts), [math.inf] * len(hosts)
    for _ in range(_ROUNDS):
        barrier()
        sent_s = all_gather_objects(_clock_s())
        received_s = all_gather_objects(_clock_s())
        for rank in range(len(hosts)):
            # What a rank sent was read before rank 0 received it, and the reverse.
            earliest_s[rank] = max(earliest_s[rank], sent_s[rank] - received_s[0])
            latest_s[rank] = min(latest_s[rank], received_s[rank] - sent_s[0])
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    ahead_s = {rank: (earliest_s[rank] + latest_s[rank]) / 2 for rank in firsts}
    error_s = max(latest_s[rank] - earliest_s[rank] for rank in firsts)
    slow, fast = min(firsts, key=ahead_s.__getitem__), max(firsts, key=ahead_s.__getitem__)
    difference_s = ahead_s[fast] - ahead_s[slow]
    if difference_s <= _CLOCK_LIMIT_S + error_s:
        return Finding("clocks", State.OK, f"differ by {difference_s:.2f} s (± {error_s:.2f} s)")
    launch = Launch.from_environment()
    is_elastic = launch is not None and launch.fewest < launch.most
    return Finding(
        "clocks",
        State.BROKEN if is_elastic else State.NOTE,
        f"{hosts[slow]} is {difference_s:.2f} s (± {error_s:.2f} s) behind {hosts[fast]}",
        f"the rendezvous of elastic runs (--rdzv-backend c10d) takes {hosts[slow]} for dead; that "
        "of a fixed number of machines (--master-addr) compares no clocks",
        "use NTP on all machines, or raise keep_alive_max_attempt in --rdzv-conf (3, times 5 s)",
    )


def _gloo() -> Finding:
    """Whether background saves can connect; where NCCL can, gloo may take another network."""
    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    try:
        BackgroundWorker()
    except UserError as error:
        return Finding("gloo", State.BROKEN, str(error))
    return Finding("gloo", State.OK, "rank 0 and all others connect, as a save does")


def _shared(output: Path, hosts: list[str], world: "World") -> Finding:
    """Whether every rank sees a file that rank 0 writes where the output directory will be."""
    from megatron_idpo.mcore.parallel.world import all_gather_objects, barrier, broadcast_from_rank0

    existing = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    directory = broadcast_from_rank0(lambda: existing)
    marker = directory / broadcast_from_rank0(lambda: f".megatron-idpo-doctor-{uuid4().hex}")
    failure = ""
    if world.is_first:
        try:
            marker.touch()
        except OSError as error:
            failure = f"{directory} cannot be written: {error.strerror}"
    failure = broadcast_from_rank0(lambda: failure)
    seen = all_gather_objects(marker.exists())
    barrier()
    if world.is_first:
        marker.unlink(missing_ok=True)
    if failure:
        return Finding("training.output", State.BROKEN, failure)
    missing = {host for host, sees in zip(hosts, seen, strict=True) if not sees}
    if missing:
        message = f"{directory} is another directory on {', '.join(sorted(missing))}"
        remedy = "name a directory on a file system that all machines share"
        return Finding("training.output", State.BROKEN, message, "", remedy)
    return Finding("training.output", State.OK, f"{directory} is the same everywhere")

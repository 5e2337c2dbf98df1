"""What the doctor looks at in the machine: cores, memory, disk, GPUs, and how fast it multiplies.

Containers are given less than the machine has, so limits of the control group count, not the
hardware's. Sizes are shown in binary units.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megatron_idpo.doctor.finding import Finding, State

if TYPE_CHECKING:
    from torch import dtype as Dtype

CGROUP = Path("/sys/fs/cgroup")
MATMUL_SIZE = 1024
"""A product of 2 GFLOP: milliseconds on a CPU, and large enough to reach its speed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run may use here."""

    cores: float
    memory_bytes: int
    free_memory_bytes: int
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and memory, in bytes, of each GPU that this process sees."""

    @classmethod
    def here(cls) -> "Machine":
        """This machine, within the limits of its container."""
        memory = psutil.virtual_memory()
        limit = _cgroup_memory_bytes()
        total = min(memory.total, limit) if limit else memory.total
        return cls(
            cores=_cores(),
            memory_bytes=total,
            free_memory_bytes=min(memory.available, total),
            gpus=_gpus(),
        )


def size_of(size_bytes: float) -> str:
    """`23.4 GiB` or, below one, `512.0 MiB`."""
    return (
        f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
    )


def examine_machine(machine: Machine, directory: Path) -> list[Finding]:
    """Cores, memory, GPUs and the disk that `directory` is on."""
    disk = shutil.disk_usage(nearest_existing(directory))
    found = [
        Finding("cores", State.OK, f"{machine.cores:g}", _speeds(machine)),
        Finding(
            "memory",
            State.OK,
            f"{size_of(machine.memory_bytes)}, {size_of(machine.free_memory_bytes)} free",
        ),
        Finding("disk", State.OK, f"{size_of(disk.free)} free of {size_of(disk.total)}"),
    ]
    if machine.gpus:
        message = ", ".join(f"{name} with {size_of(size)}" for name, size in machine.gpus)
        found.insert(0, Finding("GPUs", State.OK, f"{len(machine.gpus)}: {message}"))
    return found


def nearest_existing(directory: Path) -> Path:
    """The directory itself, or the one in which it would be made."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _cores() -> float:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    cores = cores or float(os.cpu_count() or 1)
    quota = _words(CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _cgroup_memory_bytes() -> int | None:
    """The limit of the control group: version 2's file, else version 1's."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        words = _words(CGROUP / name)
        if words and words[0] != "max":
            return int(words[0])
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _gpus() -> tuple[tuple[str, int], ...]:
    try:
        import torch
    except (ImportError, OSError):
        return ()
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return tuple((one.name, one.total_memory) for one in properties)


def _speeds(machine: Machine) -> str:
    """How fast the CPU multiplies, where it will do the work: it decides the choice of `dtype`."""
    if machine.gpus:
        return ""
    try:
        import torch
    except (ImportError, OSError):
        return ""
    speeds = {
        name: matmul_flops(dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    message = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {name}" for name, speed in speeds.items())
    if speeds["bf16"] < speeds["fp32"]:
        return f"matrix multiplication: {message}, so model.dtype=fp32 is the faster one here"
    return f"matrix multiplication: {message}"


def matmul_flops(dtype: "Dtype", clock: Callable[[], float] = time.perf_counter) -> float:
    """Measured FLOP/s of a square matrix product on the CPU, best of three."""
    import torch

    left = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    times_s = []
    for _ in range(3):
        start = clock()
        torch.mm(left, left)
        times_s.append(clock() - start)
    return 2 * MATMUL_SIZE**3 / min(times_s)

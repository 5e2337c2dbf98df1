"""Checks of the machine: cores, memory, disk and GPUs.

In a container the limits of the control group apply, not the hardware's. Sizes are in binary units.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_idpo.doctor.finding import Finding, State

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources available to a run."""

    cores: float
    memory_bytes: int
    free_memory_bytes: int
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and memory in bytes of each GPU visible to this process."""

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


def format_size(size_bytes: float) -> str:
    """`23.4 GiB` or `512.0 MiB`."""
    is_large = size_bytes >= 2**30
    return f"{size_bytes / 2**30:.1f} GiB" if is_large else f"{size_bytes / 2**20:.1f} MiB"


def check_machine(machine: Machine, directory: Path) -> list[Finding]:
    """Cores, memory, GPUs and the disk that `directory` is on."""
    disk = shutil.disk_usage(nearest_existing(directory))
    memory = f"{format_size(machine.memory_bytes)}, {format_size(machine.free_memory_bytes)} free"
    findings = [
        Finding("cores", State.OK, f"{machine.cores:g}"),
        Finding("memory", State.OK, memory),
        Finding("disk", State.OK, f"{format_size(disk.free)} free of {format_size(disk.total)}"),
    ]
    if machine.gpus:
        gpus = ", ".join(f"{name} with {format_size(size)}" for name, size in machine.gpus)
        findings.insert(0, Finding("GPUs", State.OK, f"{len(machine.gpus)}: {gpus}"))
    return findings


def nearest_existing(directory: Path) -> Path:
    """The directory itself, or the nearest parent that exists."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _cores() -> float:
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = float(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
    quota = _read_fields(CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _cgroup_memory_bytes() -> int | None:
    """The limit of the control group: version 2's file, else version 1's."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        words = _read_fields(CGROUP / name)
        if words and words[0] != "max":
            return int(words[0])
    return None


def _read_fields(path: Path) -> list[str]:
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
    return tuple((gpu.name, gpu.total_memory) for gpu in properties)

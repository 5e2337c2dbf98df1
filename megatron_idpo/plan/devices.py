"""Devices that a plan can be made for: memory, arithmetic, bandwidths, with their sources.

Peaks are of dense bf16 products at the clocks of the data sheet. `train.metrics.peak_flops` has the
same values by device name; a test compares them.
"""

import os
from dataclasses import dataclass

from megatron_idpo.errors import ConfigError

GIB = 1 << 30

HEADROOM = 0.06
"""Share of the memory that advice leaves free, for what is not known without a GPU: NCCL's buffers
for NVLink SHARP, libraries that a cluster adds. `--headroom` changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator and its links."""

    name: str
    memory_bytes: float
    """What torch reports as total memory, which is less than the product's name says."""

    peak_flops: float
    """Dense bf16."""

    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the others of its node, in one direction."""

    network_bytes_per_s: float
    """Of one device to other nodes, in one direction."""

    host_bytes_per_s: float = 25e9
    """From the host's memory: half of PCIe 5, since both directions and other GPUs share it."""

    per_node: int = 8
    is_gpu: bool = True
    headroom: float = HEADROOM
    context_bytes: float = 0.6e9
    """CUDA's context with the kernels of torch, cuBLAS and NCCL: outside torch's allocator. A
    margin."""

    cublas_bytes: float = 2 * (32 << 20)
    """Workspaces of matrix products, 32 MiB for each of two streams: the default from Hopper on."""

    nccl_bytes: float = 0.25e9
    """Buffers of one communicator: a margin. NCCL takes 4 MiB and more per channel and peer."""

    source: str

    @property
    def usable_bytes(self) -> float:
        """What an advised layout may take."""
        return self.memory_bytes * (1 - self.headroom)


DEVICES = {
    "h100": Device(
        name="H100 SXM 80 GB",
        memory_bytes=79.1 * GIB,
        peak_flops=989.5e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        source="NVIDIA H100 data sheet; NVLink 4 900 GB/s both ways; one 400 Gb/s port per GPU",
    ),
    "h200": Device(
        name="H200 SXM 141 GB",
        memory_bytes=139.8 * GIB,
        peak_flops=989.5e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        source="NVIDIA H200 data sheet; NVLink 4 900 GB/s both ways; one 400 Gb/s port per GPU",
    ),
    "b200": Device(
        name="B200 180 GB",
        memory_bytes=178.3 * GIB,
        peak_flops=2250e12,
        memory_bytes_per_s=8.0e12,
        link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
        source="NVIDIA HGX B200 data sheet; NVLink 5 1.8 TB/s both ways; one 400 Gb/s port per GPU",
    ),
    "a100": Device(
        name="A100 SXM 80 GB",
        memory_bytes=79.1 * GIB,
        peak_flops=312e12,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        host_bytes_per_s=12e9,
        source="NVIDIA A100 data sheet; NVLink 3 600 GB/s both ways; one 200 Gb/s port per GPU",
    ),
}

CPU_FLOPS_PER_CORE = 150e9
"""fp32 products on one core with AVX-512 at 2.4 GHz; other cores differ by a factor of two."""


def find_device(name: str, processes: int) -> Device:
    """A device by name; `cpu` is this machine, whose memory and cores all processes share.

    Raises:
        ConfigError: it is not known.
    """
    if name in DEVICES:
        return DEVICES[name]
    if name != "cpu":
        known = ", ".join((*DEVICES, "cpu"))
        raise ConfigError.at("--device", f"{name!r} is not known", f"use one of {known}")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Device(
        name="process on this machine's CPU",
        memory_bytes=memory_bytes / processes,
        peak_flops=CPU_FLOPS_PER_CORE * (cores or 1) / processes,
        memory_bytes_per_s=20e9 / processes,
        link_bytes_per_s=2e9,
        network_bytes_per_s=1e9,
        per_node=processes,
        is_gpu=False,
        headroom=0.0,
        # The process with its libraries 0.8 GB, code of oneDNN and gaps in glibc's heap: resident
        # peaks of SmolLM2-135M in 7 runs of compare_trl.py: 7 % too low to 15 % too high in total.
        context_bytes=1.3e9,
        cublas_bytes=0.0,
        nccl_bytes=0.0,
        source="memory and cores of this machine; other values are orders of magnitude",
    )


def device_of(gpu_name: str) -> Device | None:
    """The device that torch reports by this name; None if it is another one, such as a GH200."""
    words = gpu_name.upper().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key.upper() in words), None)

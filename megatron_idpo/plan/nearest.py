"""What would fit where a run does not: each a change that is enough, the smallest first."""

from dataclasses import replace

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.plan.devices import DEVICES, Device
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.search import Found, fitted_here, search

MAX_NODES = 512
"""How far the search for enough GPUs goes."""

NEXT_NODES = 8
"""Up to so many, every number of nodes is tried; then powers of two."""

TYPICAL_HOST_BYTES_PER_WEIGHT = 12
RESIDENT_BYTES_PER_WEIGHT = 6
PRECISION_AWARE_BYTES_PER_WEIGHT = 12
"""Bytes of one weight: on the host with an offloaded optimizer, and then on the GPU; on the GPU
with 16-bit moments and remainders (decisions.md, "Planning")."""


def nearest_that_fits(run: RunSizes, device: Device) -> list[str]:
    """Changes as sentences: this layout with recomputation, another one, more GPUs, ..."""
    nearest = []
    if (here := fitted_here(run, device)) and here.settings:
        nearest.append(f"the same layout: {_settings(here)}")
    if found := search(run, device):
        nearest.append(f"the fastest layout: {_settings(found[0])}")
        return nearest
    nearest += _more_gpus(run, device)
    if run.lora is None:
        with_lora = replace(run, lora=LoraConfig().for_model(run.model))
        if found := search(with_lora, device):
            nearest.append(f"LoRA on these GPUs: lora='{{rank: 16}}' {_settings(found[0])}")
    for name, other in DEVICES.items():
        if other.memory_bytes > device.memory_bytes and (found := search(run, other)):
            nearest.append(f"{run.world_size} × {name}: {_settings(found[0])}")
            break
    shorter = run.row_tokens // 2
    if shorter >= run.longest_pair_tokens and (
        found := search(replace(run, row_tokens=shorter), device)
    ):
        nearest.append(f"data.row_tokens={shorter} {_settings(found[0])}")
    return nearest


def not_supported(run: RunSizes) -> str | None:
    """What other trainers would do for all weights, with figures; None with adapters."""
    if run.lora is not None:
        return None
    on_gpu, compact, on_host = (
        run.model.parameters * size / 1e9
        for size in (
            RESIDENT_BYTES_PER_WEIGHT,
            PRECISION_AWARE_BYTES_PER_WEIGHT,
            TYPICAL_HOST_BYTES_PER_WEIGHT,
        )
    )
    gpus = run.world_size
    text = "not supported: the optimizer's state on the host "
    text += f"({on_gpu / gpus:.0f} GB per GPU would stay, {on_host:,.0f} GB move to the host), "
    text += "a precision-aware optimizer "
    return text + f"({compact / gpus:.0f} GB per GPU); both before activations"


def _more_gpus(run: RunSizes, device: Device) -> list[str]:
    nodes = max(run.world_size // device.per_node, 1)
    counts = list(range(nodes + 1, nodes + NEXT_NODES + 1))
    while (more := counts[-1] * 2) <= MAX_NODES:
        counts.append(more)
    if run.world_size < device.per_node:
        doubled = [run.world_size * 2, run.world_size * 4, device.per_node]
        smaller = [gpus for gpus in doubled if run.world_size < gpus <= device.per_node]
    else:
        smaller = []
    for gpus in dict.fromkeys([*smaller, *(count * device.per_node for count in counts)]):
        if found := search(replace(run, world_size=gpus), device):
            return [f"{gpus} GPUs: {_settings(found[0])}"]
    return []


def _settings(found: Found) -> str:
    return " ".join(found.settings) or "as in the file"

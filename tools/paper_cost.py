"""What a table costs before it is started: memory, time and disk of each run, from its plan.

Times are roofline estimates of the training (`megatron-idpo plan`); evaluations come on top.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.doctor.machine import nearest_existing
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.report.facts import duration
from megatron_idpo.plan.devices import DEVICES, Device, device_of, find_device
from megatron_idpo.plan.main import GB, with_data
from megatron_idpo.plan.memory import GRADIENT_BYTES, MAIN_BYTES, MOMENTS_BYTES
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import BYTES, Assumptions, RunSizes

DEVICE_NAMES: Final = (*DEVICES, "cpu")
THIS_MACHINE: Final = "here"
"""The device of the estimate: the GPU of this machine, or its processor."""

NOTE: Final = (
    "Training only, estimated and not measured (megatron-idpo plan); evaluations add to it."
)
UNKNOWN: Final = "?"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run."""

    name: str
    plan: Plan
    disk_bytes: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row of the table."""
        days, memory = self.plan.days, self.plan.largest.total / GB
        time = UNKNOWN if days is None else duration(days * 86400)
        of_device = f"{memory:.1f} of {self.plan.device.memory_bytes / GB:.0f} GB"
        if not self.plan.fits:
            of_device += ": does not fit"
        return self.name, of_device, time, f"{self.disk_bytes / GB:.1f} GB"


def estimate(configs: dict[str, Path], processes: int, device_name: str) -> list[Cost]:
    """The cost of each run.

    Args:
        configs: name of a run -> its configuration.
        processes: that train it.
        device_name: of `plan/devices.py`, or `THIS_MACHINE`.

    Raises:
        ConfigError: sizes of the model are not known, or the layout does not fit it.
    """
    device, costs = _device(device_name, processes), []
    for name, path in configs.items():
        config = load_config(path, optional=SECTIONS)
        model = find_model(config.model.path).sizes
        run = RunSizes.of(config, model, processes, with_data(config, Assumptions()))
        plan = Plan.of(run, device)
        costs.append(Cost(name, plan, disk_bytes(config, plan)))
    return costs


def disk_bytes(config: RunConfig, plan: Plan) -> float:
    """Most that a run occupies at a time: checkpoints, snapshots of sDPO, and the results."""
    layout, run = plan.run.layout, plan.run
    trained = layout.tensor * sum(one.components()["gradients"] for one in plan.memory)
    trained /= GRADIENT_BYTES
    weight_bytes = run.model.parameters * run.width
    state = trained * (run.width + MAIN_BYTES + MOMENTS_BYTES)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # one is being written
    exported = run.model.parameters * BYTES[config.export.dtype or config.model.dtype]
    results = (exported + trained * run.width) if config.training.export else 0.0
    snapshots = 0
    if config.sdpo is not None:
        snapshots = len(config.sdpo.steps) if config.sdpo.keep_snapshots == "all" else 1
    return kept * state + snapshots * weight_bytes + results


def report(costs: Sequence[Cost]) -> list[str]:
    """The table as lines."""
    device = costs[0].plan.device.name
    processes = costs[0].plan.run.world_size
    rows = [("run", "memory", "time", "disk"), *(cost.cells for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    days = [cost.plan.days for cost in costs]
    known = [one for one in days if one is not None]
    total = duration(86400 * sum(known)) if len(known) == len(days) else UNKNOWN
    disk = sum(cost.disk_bytes for cost in costs) / GB
    summary = f"{processes} × {device}: {total} in all, {disk:.0f} GB of disk"
    if UNKNOWN in total:
        summary += "; the time needs the number of pairs, which is not known before the download"
    return [summary, *lines, NOTE]


def check_disk(costs: Sequence[Cost], output: Path) -> None:
    """That what is not there yet fits on the disk.

    Raises:
        ConfigError: it does not.
    """
    needed = sum(cost.disk_bytes for cost in costs)
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = shutil.disk_usage(nearest_existing(output)).free
    if needed - there > free:
        message = f"needs about {needed / GB:.0f} GB, and {free / GB:.0f} GB are free there"
        raise ConfigError.at("--output", message, "free some space, or name another disk")


def _device(name: str, processes: int) -> Device:
    """A device of `plan/devices.py`, or this machine's."""
    if name != THIS_MACHINE:
        return find_device(name, processes)
    import torch

    if not torch.cuda.is_available():
        return find_device("cpu", processes)
    gpu = torch.cuda.get_device_name()
    if (device := device_of(gpu)) is not None:
        return device
    message = f"this machine's {gpu} is not known"
    raise ConfigError.at("--device", message, "name a similar one, such as h100")

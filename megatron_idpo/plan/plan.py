"""`Plan`: memory and time of one run on one kind of device, with what is advised."""

from dataclasses import dataclass
from typing import Any

from megatron_idpo.plan.choices import Choice, balanced_split, cheapest_recompute, fits
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import StageMemory, run_memory
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_time import LABEL, StepTime, step_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on a device."""

    run: RunSizes
    device: Device
    memory: tuple[StageMemory, ...]
    time: StepTime

    @classmethod
    def of(cls, run: RunSizes, device: Device) -> "Plan":
        """For a run whose layout fits its model."""
        memory = tuple(run_memory(run, device))
        return cls(run=run, device=device, memory=memory, time=step_time(run, device))

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the device's memory."""
        return fits(list(self.memory), self.device)

    @property
    def largest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def days(self) -> float | None:
        """Of training; None if the number of pairs is not known."""
        pairs = self.run.assumed.pairs
        if pairs is None:
            return None
        return pairs * self.run.epochs / self.time.pairs_per_s / 86400

    def advice(self) -> list[Choice]:
        """Settings that are better than the configuration's."""
        choices = [cheapest_recompute(self.run, self.device), balanced_split(self.run, self.device)]
        has = {(self.run.recompute, self.run.recompute_layers)}
        return [
            choice
            for choice in choices
            if choice is not None
            and (
                choice.run.layout != self.run.layout
                or (choice.run.recompute, choice.run.recompute_layers) not in has
            )
        ]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes, seconds."""
        run, time = self.run, self.time
        stages = [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "taps": list(stage.taps),
                "rows_in_flight": list(stage.rows_in_flight),
                "peak_bytes": round(stage.total),
                "components_bytes": {
                    name: round(size) for name, size in stage.components().items()
                },
            }
            for stage in self.memory
        ]
        advice = [{"setting": one.setting, "reason": one.reason} for one in self.advice()]
        return {
            "gpus": run.world_size,
            "device": self.device.name,
            "parameters": run.model.parameters,
            "layout": run.layout.model_dump(mode="json") | {"data": run.data},
            "stages": stages,
            "fits": self.fits,
            "device_bytes": round(self.device.memory_bytes),
            "time_is": LABEL,
            "step_s": time.step,
            "rows_per_step": time.rows,
            "mfu": time.mfu,
            "pairs_per_s": time.pairs_per_s,
            "days": self.days,
            "advice": advice,
        }

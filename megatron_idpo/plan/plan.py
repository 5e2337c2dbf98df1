"""`Plan`: memory and time of one run on one kind of device, with what is advised."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_idpo.plan.choices import Choice, advised, cheapest_recompute, fits
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
        """For a run whose layout fits its model; `recompute: auto` is replaced by what fits."""
        if run.recompute == "auto":
            choice = cheapest_recompute(run, device)
            run = replace(run, recompute="full") if choice is None else choice.run
        memory = tuple(run_memory(run, device))
        return cls(run=run, device=device, memory=memory, time=step_time(run, device))

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the device's memory."""
        return fits(list(self.memory), self.device)

    @property
    def is_tight(self) -> bool:
        """Whether less than the device's headroom is left."""
        return self.largest.total > self.device.usable_bytes

    @property
    def largest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def cache_s(self) -> float:
        """Seconds for the reference's log-probabilities of all pairs, before the first step; 0
        without a cache or if the number of pairs is not known."""
        pairs = self.run.assumed.pairs
        if pairs is None or self.run.reference != "cache":
            return 0.0
        return self.time.forward * pairs / self.run.global_batch_pairs

    @property
    def days(self) -> float | None:
        """Of the run, with the reference's cache; None if the number of pairs is not known."""
        pairs = self.run.trained_pairs
        if pairs is None:
            return None
        return (pairs / self.time.pairs_per_s + self.cache_s) / 86400

    def advice(self) -> list[Choice]:
        """Settings that are better than the configuration's, to be changed together."""
        return advised(self.run, self.device)

    def warnings(self) -> list[str]:
        """What fits, but is probably not what is wanted."""
        run, lines = self.run, []
        pairs = run.global_batch_pairs
        if run.data > pairs:
            message = f"training.global_batch_pairs={pairs}: {run.data - pairs} of {run.data} "
            message += "replicas of the model have no pair in a step"
            lines.append(f"{message}; use fewer GPUs or larger batches")
        elif pairs % run.data:
            message = f"training.global_batch_pairs={pairs} is not a multiple of the {run.data}"
            lines.append(
                f"{message} replicas: some have a pair more than others and are waited for"
            )
        if run.trained_pairs is not None and run.trained_pairs < pairs:
            message = f"training.global_batch_pairs={pairs}: the run has only {run.trained_pairs}"
            lines.append(f"{message} pairs, too few for a step; use smaller batches or more data")
        if self.fits and self.is_tight:
            share = self.largest.total / self.device.memory_bytes
            lines.append(
                f"{share:.0%} of the memory is planned: the margins have never been measured"
            )
        if self.device.name.startswith("B200"):
            lines.append("time assumes 65 % of the peak, which is rarely reached on a B200")
        return lines

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
                "row_s": row.total,
            }
            for stage, row in zip(self.memory, time.stages, strict=True)
        ]
        advice = [{"setting": one.setting, "reason": one.reason} for one in self.advice()]
        limit, share = time.limit
        return {
            "gpus": run.world_size,
            "device": self.device.name,
            "parameters": run.model.parameters,
            "layout": run.layout.model_dump(mode="json") | {"data": run.data},
            "recompute": {"mode": run.recompute, "layers": run.recompute_layers},
            "stages": stages,
            "fits": self.fits,
            "is_tight": self.is_tight,
            "device_bytes": round(self.device.memory_bytes),
            "time_is": LABEL,
            "step_s": time.step,
            "parts_s": time.parts(),
            "slowest_stage": time.slowest,
            "imbalance": time.imbalance,
            "limit": limit,
            "limit_share": share,
            "rows_per_step": time.rows,
            "row_tokens": time.work.row_tokens,
            "used_share": time.work.used_share,
            "mfu": time.mfu,
            "pairs_per_s": time.pairs_per_s,
            "trained_pairs": run.trained_pairs,
            "reference_cache_s": self.cache_s,
            "days": self.days,
            "assumed": asdict(run.assumed),
            "warnings": self.warnings(),
            "advice": advice,
        }

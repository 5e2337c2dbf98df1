"""Layouts that fit a number of GPUs, ranked by the time of a step, with what limits each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.plan.choices import balanced_split, cheapest_recompute
from megatron_idpo.plan.devices import DEVICES, Device
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_time import StepTime

MAX_GPUS = 4096
"""How far the search for enough GPUs goes."""

MAX_PIPELINE = 16
VIRTUAL_PIPELINES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Found:
    """A layout with the settings that it was planned with."""

    plan: Plan
    settings: tuple[str, ...]
    """Overrides of the configuration."""

    limit: str
    """What the step waits for most, besides the products."""


def search(run: RunSizes, device: Device) -> list[Found]:
    """All layouts that fit, the fastest first.

    Each with the cheapest recomputation that fits and a balanced split.
    """
    found = [one for layout in _layouts(run, device) if (one := _fitted(run, layout, device))]
    return sorted(found, key=lambda one: one.plan.time.step)


def nearest_that_fits(run: RunSizes, device: Device) -> list[str]:
    """What would fit where nothing does: each a change that is enough, as a sentence."""
    nearest = []
    gpus = run.world_size
    while (gpus := gpus * 2) <= MAX_GPUS:
        if found := search(replace(run, world_size=gpus), device):
            nearest.append(f"{gpus} GPUs: {' '.join(found[0].settings)}")
            break
    if run.lora is None:
        with_lora = replace(run, lora=LoraConfig().for_model(run.model))
        if found := search(with_lora, device):
            settings = " ".join(found[0].settings)
            nearest.append(f"LoRA on these GPUs: add the section lora; {settings}")
    for name, other in DEVICES.items():
        if other.memory_bytes > device.memory_bytes and (found := search(run, other)):
            nearest.append(f"{run.world_size} × {name}: {' '.join(found[0].settings)}")
            break
    shorter = run.row_tokens // 2
    if shorter >= run.assumed.pair_tokens and (
        found := search(replace(run, row_tokens=shorter), device)
    ):
        nearest.append(f"data.row_tokens={shorter} {' '.join(found[0].settings)}")
    return nearest


def _fitted(run: RunSizes, layout: Layout, device: Device) -> Found | None:
    """This layout with the cheapest settings that fit; None if it does not fit."""
    candidate = replace(run, layout=layout)
    split = balanced_split(candidate, device)
    settings = [_setting(layout)]
    if split is not None:
        candidate = split.run
        settings.append(split.setting)
    recompute = cheapest_recompute(candidate, device)
    if recompute is None:
        return None
    if recompute.run.recompute != "off":
        settings.append(recompute.setting)
    plan = Plan.of(recompute.run, device)
    return Found(plan, tuple(settings), _limit(plan.time))


def _layouts(run: RunSizes, device: Device) -> Iterator[Layout]:
    """Layouts of this world that fit the model and can be split into whole nodes."""
    for tensor in _divisors(min(device.per_node, run.world_size)):
        for pipeline in _divisors(run.world_size // tensor):
            if pipeline > min(MAX_PIPELINE, run.model.num_layers):
                continue
            for chunks in VIRTUAL_PIPELINES if pipeline > 1 else (1,):
                for expert in _divisors(run.model.num_experts or 1):
                    layout = _layout(run, tensor, pipeline, chunks, expert)
                    if layout is not None:
                        yield layout


def _layout(run: RunSizes, tensor: int, pipeline: int, chunks: int, expert: int) -> Layout | None:
    """A layout, or None if it does not fit the model, the world, the rows or the batch."""
    few, more = divmod(run.model.num_layers, pipeline * chunks)
    if not few or (more and chunks > 1) or run.row_tokens % tensor:
        return None
    split = [few + (stage < more) for stage in range(pipeline)] if more else None
    fields = {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": chunks,
        "expert": expert,
        "sequence_parallel": tensor > 1,
        "pipeline_layers": split,
    }
    layout = Layout.model_validate(fields)
    if layout.problems_for(run.model, run.world_size):
        return None
    # Every replica needs a pair.
    return layout if layout.data(run.world_size) <= run.global_batch_pairs else None


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _setting(layout: Layout) -> str:
    """A layout as overrides, without fields that have their defaults."""
    names = ("tensor", "pipeline", "virtual_pipeline", "expert", "sequence_parallel")
    values = {name: getattr(layout, name) for name in names}
    defaults = Layout().model_dump()
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    words = [f"layout.{name}={str(value).lower()}" for name, value in changed.items()]
    if layout.pipeline_layers is not None:
        words.append(f"layout.pipeline_layers='[{','.join(map(str, layout.pipeline_layers))}]'")
    return " ".join(words) or "layout.tensor=1"


def _limit(time: StepTime) -> str:
    """The largest part of a step besides matrix products."""
    row = time.stages[time.slowest]
    if row.host > row.gpu:
        return "host: launching kernels takes longer than they run"
    parts = {
        "recomputation": row.recompute * time.rows,
        "attention": row.attention * time.rows,
        "heads": row.heads * time.rows,
        "memory bandwidth": row.elementwise * time.rows,
        "tensor-parallel traffic": row.tensor_traffic * time.rows,
        "expert traffic": row.expert_traffic * time.rows,
        "pipeline bubble": time.bubble,
        "data-parallel traffic": time.data_traffic,
        "optimizer": time.update,
        "reference": time.reference,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / time.step:.0%} of the step"

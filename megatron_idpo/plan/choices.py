"""What a plan advises: the pipeline split that balances the stages, the cheapest recomputation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import StageMemory, run_memory
from megatron_idpo.plan.row_time import row_time
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_rows import step_rows
from megatron_idpo.plan.step_time import step_time

WORTH_CHANGING = 0.995
"""A step that is less than half a percent shorter is not worth another setting."""

MAX_CHUNKS = 10
"""Chunks per stage: more make the pipeline's messages too many."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A run with a setting changed, and why."""

    run: RunSizes
    setting: str
    """As an override of the configuration."""

    reason: str


def peak_bytes(run: RunSizes, device: Device) -> float:
    """Memory of the fullest stage."""
    return max(stage.total for stage in run_memory(run, device))


def fits(memory: list[StageMemory], device: Device) -> bool:
    """Whether every stage fits."""
    return max(stage.total for stage in memory) <= device.memory_bytes


def with_recompute(run: RunSizes, layers: int | None) -> RunSizes:
    """With so many recomputed layers of each chunk; None: all."""
    mode = "full" if layers != 0 else "off"
    return replace(run, recompute=mode, recompute_layers=layers or None)


def cheapest_recompute(run: RunSizes, device: Device) -> Choice | None:
    """The setting that recomputes the least and leaves the device's headroom free.

    If recomputing every layer leaves less, it still counts as long as it fits. `selective` is never
    chosen: fused attention keeps no scores, so it saves nothing.

    Returns:
        None if not even recomputing every layer fits.
    """
    longest = max(len(layers) for _, layers in _all_chunks(run))
    # More recomputed layers never need more memory between these ends, so bisection finds the
    # fewest; all of them (null) is a different method of megatron-core with the same memory.
    least = peak_bytes(with_recompute(run, None), device)
    if least > device.memory_bytes:
        return None
    limit = max(device.usable_bytes, least)
    low, high = 0, longest
    while low < high:
        middle = (low + high) // 2
        if peak_bytes(with_recompute(run, middle), device) <= limit:
            high = middle
        else:
            low = middle + 1
    if low == 0:
        return Choice(with_recompute(run, 0), "training.recompute=off", "everything fits without")
    if low == longest:
        reason = "only the inputs of layers fit"
        return Choice(with_recompute(run, None), "training.recompute=full", reason)
    setting = f"training.recompute=full training.recompute_layers={low}"
    reason = f"{low} of {longest} layers of a chunk are the fewest that fit"
    if device.headroom:
        reason += f" and leave {device.headroom:.0%} free"
    return Choice(with_recompute(run, low), setting, reason)


def balanced_split(run: RunSizes, device: Device) -> Choice | None:
    """The split of the layers over the stages with the shortest slowest stage.

    Only without interleaving, whose chunks are too many to be worth it. It may need more memory
    than the run's split: early stages keep the most rows.

    Returns:
        None if the run's split is as good, or there is one stage.
    """
    stages, num_layers = run.layout.pipeline, run.model.num_layers
    if stages == 1 or run.layout.virtual_pipeline > 1:
        return None
    layer, head = _layer_and_head_s(run, device)
    split = _shortest_split(run, layer, head)
    layout = run.layout.model_copy(update={"pipeline_layers": split})
    balanced = replace(run, layout=layout)
    if sum(split) != num_layers or len(split) != stages:
        return None
    before, after = step_time(run, device), step_time(balanced, device)
    if after.step >= before.step * WORTH_CHANGING:
        return None
    setting = f"layout.pipeline_layers='[{','.join(map(str, split))}]'"
    reason = f"a head takes as long as {head / layer:.1f} layers; the slowest stage then takes "
    reason += f"{after.imbalance:.2f} of the mean instead of {before.imbalance:.2f}"
    return Choice(balanced, setting, reason)


def interleaved(run: RunSizes, device: Device) -> Choice | None:
    """The number of chunks per stage with the shortest step.

    Returns:
        None if the run's is as good, or there is one stage, or the layers are split by hand.
    """
    stages, num_layers = run.layout.pipeline, run.model.num_layers
    if stages == 1 or run.layout.pipeline_layers is not None:
        return None
    best: Choice | None = None
    before = shortest = step_time(run, device).step
    for chunks in chunk_counts(num_layers, stages):
        if chunks == run.layout.virtual_pipeline:
            continue
        layout = run.layout.model_copy(update={"virtual_pipeline": chunks})
        changed = replace(run, layout=layout)
        if layout.problems_for(run.model, run.world_size):
            continue
        if peak_bytes(changed, device) > device.usable_bytes:
            continue
        step = step_time(changed, device).step
        if step < min(shortest, before * WORTH_CHANGING):
            shortest = step
            reason = f"{step:.3f} s per step instead of {before:.3f}: a shorter pipeline bubble"
            best = Choice(changed, f"layout.virtual_pipeline={chunks}", reason)
    return best


def chunk_counts(num_layers: int, stages: int) -> list[int]:
    """Chunks per stage that divide the layers evenly; 1 always."""
    if stages == 1:
        return [1]
    counts = range(2, min(MAX_CHUNKS, num_layers // stages) + 1)
    return [1, *(count for count in counts if num_layers % (stages * count) == 0)]


def advised(run: RunSizes, device: Device) -> list[Choice]:
    """What to change together: of each pipeline split its cheapest recomputation, the fastest.

    Returns:
        Choices that belong together; the last one's run has all of them.
    """
    best: list[Choice] = []
    shortest = step_time(run, device).step if peak_bytes(run, device) <= device.memory_bytes else 0
    for change in (None, balanced_split(run, device), interleaved(run, device)):
        candidate = run if change is None else change.run
        choices = [] if change is None else [change]
        recompute = cheapest_recompute(candidate, device)
        if recompute is None:
            continue
        found = recompute.run
        wanted = (found.recompute, found.recompute_layers)
        if wanted != (candidate.recompute, candidate.recompute_layers):
            candidate = found
            choices.append(recompute)
        step = step_time(candidate, device).step
        # Less memory than the headroom allows is a reason even if the step is longer.
        is_needed = change is None and peak_bytes(run, device) > device.usable_bytes
        if choices and (is_needed or not shortest or step < shortest * WORTH_CHANGING):
            best, shortest = choices, step
    return best


def _shortest_split(run: RunSizes, layer: float, head: float) -> tuple[int, ...]:
    """Layers of each stage, from seconds of a layer and a head."""
    stages, num_layers = run.layout.pipeline, run.model.num_layers
    # No stage is further from the mean than its heads can make it.
    most = round(head / layer * (len(run.taps) + 1)) + 2
    mean = num_layers // stages

    @cache
    def longest(stage: int, first: int) -> tuple[float, tuple[int, ...]]:
        """The slowest of the stages from this one on, if they hold the layers from `first` on."""
        left = stages - stage
        if left == 1:
            own = range(first, num_layers + 1)
            if not own:
                return float("inf"), ()
            return len(own) * layer + head * (1 + len(run.taps_in(own))), (len(own),)
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        until = min(mean + most, num_layers - first + 1 - (left - 1))
        for count in range(max(1, mean - most), until + 1):
            own = range(first, first + count)
            seconds = count * layer + head * len(run.taps_in(own))
            if seconds >= best[0]:
                break
            after, split = longest(stage + 1, first + count)
            best = min(best, (max(seconds, after), (count, *split)), key=lambda found: found[0])
        return best

    return longest(0, 1)[1]


def _all_chunks(run: RunSizes) -> Iterator[tuple[int, range]]:
    for stage in range(run.layout.pipeline):
        yield from run.chunks(stage)


def _layer_and_head_s(run: RunSizes, device: Device) -> tuple[float, float]:
    """Seconds of a layer and of a head, for one row."""
    plain = replace(step_rows(run, is_gpu=device.is_gpu).of(run), taps=())
    first, last = row_time(plain, 0, device), row_time(plain, run.layout.pipeline - 1, device)
    layers = sum(len(layers) for _, layers in plain.chunks(0))
    return first.total / layers, last.heads

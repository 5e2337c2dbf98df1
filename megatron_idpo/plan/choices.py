"""What a plan advises: the pipeline split that balances the stages, the cheapest recomputation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import StageMemory, run_memory
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_time import row_time, step_time


@dataclass(frozen=True, slots=True)
class Choice:
    """A run with a setting changed, and why."""

    run: RunSizes
    setting: str
    """As an override of the configuration."""

    reason: str


def fits(memory: list[StageMemory], device: Device) -> bool:
    """Whether every stage fits."""
    return max(stage.total for stage in memory) <= device.memory_bytes


def cheapest_recompute(run: RunSizes, device: Device) -> Choice | None:
    """The setting that recomputes the least and fits.

    `selective` is never chosen: fused attention keeps no scores, so it saves nothing.

    Returns:
        None if not even recomputing every layer fits.
    """

    def recomputing(layers: int | None) -> RunSizes:
        mode = "full" if layers != 0 else "off"
        return replace(run, recompute=mode, recompute_layers=layers or None)

    longest = max(len(layers) for _, layers in _all_chunks(run))
    # More recomputed layers never need more memory between these ends, so bisection finds the
    # fewest; all of them (null) is a different method of megatron-core with the same memory.
    candidates = range(longest + 1)
    if not fits(run_memory(recomputing(None), device), device):
        return None
    low, high = 0, longest
    while low < high:
        middle = (low + high) // 2
        if fits(run_memory(recomputing(candidates[middle]), device), device):
            high = middle
        else:
            low = middle + 1
    if low == 0:
        return Choice(recomputing(0), "training.recompute=off", "everything fits without")
    if low == longest:
        reason = "only the inputs of layers fit"
        return Choice(recomputing(None), "training.recompute=full", reason)
    setting = f"training.recompute=full training.recompute_layers={low}"
    reason = f"{low} of {longest} layers of a chunk are the fewest that fit"
    return Choice(recomputing(low), setting, reason)


def balanced_split(run: RunSizes, device: Device) -> Choice | None:
    """The split of the layers over the stages with the shortest slowest stage.

    Only without interleaving, whose chunks are too many to be worth it.

    Returns:
        None if the run's split is as good, or there is one stage.
    """
    stages, num_layers = run.layout.pipeline, run.model.num_layers
    if stages == 1 or run.layout.virtual_pipeline > 1:
        return None
    layer, head = _layer_and_head_s(run, device)
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

    _, split = longest(0, 1)
    layout = run.layout.model_copy(update={"pipeline_layers": split})
    balanced = replace(run, layout=layout)
    before, after = step_time(run, device), step_time(balanced, device)
    if after.step >= before.step * 0.995:
        return None
    setting = f"layout.pipeline_layers='[{','.join(map(str, split))}]'"
    reason = f"a head takes as long as {head / layer:.1f} layers; the slowest stage then takes "
    reason += f"{after.imbalance:.2f} of the mean instead of {before.imbalance:.2f}"
    return Choice(balanced, setting, reason)


def _all_chunks(run: RunSizes) -> Iterator[tuple[int, range]]:
    for stage in range(run.layout.pipeline):
        yield from run.chunks(stage)


def _layer_and_head_s(run: RunSizes, device: Device) -> tuple[float, float]:
    """Seconds of a layer and of a head, for one row."""
    plain = replace(run, taps=())
    first, last = row_time(plain, 0, device), row_time(plain, run.layout.pipeline - 1, device)
    layers = sum(len(layers) for _, layers in plain.chunks(0))
    return first.total / layers, last.heads

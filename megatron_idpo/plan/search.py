"""Layouts that fit a number of GPUs, ranked by the time of a step, with what limits each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_idpo.config.layout import Layout
from megatron_idpo.plan.choices import balanced_split, cheapest_recompute, chunk_counts, peak_bytes
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_rows import step_rows
from megatron_idpo.plan.step_time import step_time

MAX_PIPELINE = 16

LONG_ROW_TOKENS = 32768
"""Rows are split over context-parallel ranks from here on: a rank's part of a shorter one is too
small for the kernels."""


@dataclass(frozen=True, slots=True)
class Found:
    """A layout with the settings that it was planned with."""

    plan: Plan
    settings: tuple[str, ...]
    """Overrides that turn the file's settings into these."""

    is_in_file: bool
    """Whether it is the configuration's layout."""

    @property
    def limit(self) -> str:
        """What the step waits for most, besides the products."""
        name, share = self.plan.time.limit
        return name if name.startswith("host") else f"{name}, {share:.0%} of the step"


def search(run: RunSizes, device: Device) -> list[Found]:
    """All layouts that fit, the fastest first; of each number of chunks per stage only the best.

    Each with the cheapest recomputation that fits and a balanced split. The configuration's layout
    is always among them, if it fits.
    """
    best: dict[tuple[int, ...], Found] = {}
    for layout in _layouts(run, device):
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        key = (*sizes, layout.expert_tensor or layout.tensor)
        found = _fitted(run, layout, device)
        if found and (key not in best or _step(found) < _step(best[key])):
            best[key] = found
    found_layouts = list(best.values())
    if not run.layout.problems_for(run.model, run.world_size):
        same = [one for one in found_layouts if one.is_in_file]
        own = None if same else _fitted(run, run.layout, device)
        found_layouts += [own] if own else []
    return sorted(found_layouts, key=_step)


def fitted_here(run: RunSizes, device: Device) -> Found | None:
    """The configuration's layout with the cheapest settings that fit; None if it does not fit."""
    return _fitted(run, run.layout, device)


def _step(found: Found) -> float:
    return found.plan.time.step


def _fitted(run: RunSizes, layout: Layout, device: Device) -> Found | None:
    """This layout with the cheapest settings that fit; None if it does not fit."""
    uniform = replace(run, layout=layout)
    split = balanced_split(uniform, device)
    best: RunSizes | None = None
    for candidate in (uniform, *([split.run] if split else [])):
        recompute = cheapest_recompute(candidate, device)
        if recompute is None:
            continue
        if best is None or _is_better(recompute.run, best, device):
            best = recompute.run
    if best is None:
        return None
    settings = [] if best.layout == run.layout else [_setting(best.layout)]
    if (best.recompute, best.recompute_layers) != (run.recompute, run.recompute_layers):
        settings.append(f"training.recompute={best.recompute}")
        if best.recompute_layers != run.recompute_layers:
            layers = "null" if best.recompute_layers is None else best.recompute_layers
            settings[-1] += f" training.recompute_layers={layers}"
    return Found(Plan.of(best, device), tuple(settings), is_in_file=layout == run.layout)


def _is_better(one: RunSizes, other: RunSizes, device: Device) -> bool:
    """Faster, unless it is the only one that leaves no headroom."""
    is_tight = [peak_bytes(run, device) > device.usable_bytes for run in (one, other)]
    if is_tight[0] != is_tight[1]:
        return is_tight[1]
    return step_time(one, device).step < step_time(other, device).step


def _layouts(run: RunSizes, device: Device) -> Iterator[Layout]:
    """Layouts of this world that fit the model and can be split into whole nodes."""
    is_long = run.row_tokens >= LONG_ROW_TOKENS or run.layout.context > 1
    experts = run.model.num_experts
    for tensor in _divisors(min(device.per_node, run.world_size)):
        for pipeline in _divisors(run.world_size // tensor):
            if pipeline > min(MAX_PIPELINE, run.model.num_layers):
                continue
            ranks = run.world_size // (tensor * pipeline)
            contexts = _divisors(ranks) if is_long and not experts else [1]
            for context in contexts:
                for chunks in chunk_counts(run.model.num_layers, pipeline):
                    for expert in _divisors(experts or 1):
                        for expert_tensor in (None, 1) if experts and tensor > 1 else (None,):
                            fields = {
                                "tensor": tensor,
                                "pipeline": pipeline,
                                "virtual_pipeline": chunks,
                                "context": context,
                                "expert": expert,
                                "expert_tensor": expert_tensor,
                            }
                            layout = _layout(run, fields)
                            if layout is not None:
                                yield layout


def _layout(run: RunSizes, fields: dict[str, int | None]) -> Layout | None:
    """A layout, or None if it does not fit the model, the world, the rows or the batch."""
    tensor, pipeline = fields["tensor"] or 1, fields["pipeline"] or 1
    few, more = divmod(run.model.num_layers, pipeline)
    split = [few + (stage < more) for stage in range(pipeline)] if more else None
    layout = Layout.model_validate(
        {**fields, "sequence_parallel": tensor > 1, "pipeline_layers": split}
    )
    shards = layout.tensor * layout.context
    if run.row_tokens % shards or (run.trim_tokens and run.trim_tokens % shards):
        return None
    if layout.problems_for(run.model, run.world_size):
        return None
    # Every replica needs a pair.
    if layout.data(run.world_size) > run.global_batch_pairs:
        return None
    # Interleaving with fewer rows than stages computes empty ones.
    if layout.virtual_pipeline > 1 and step_rows(replace(run, layout=layout)).rows < pipeline:
        return None
    return layout


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _setting(layout: Layout) -> str:
    """A layout as one override, which replaces the file's whole section."""
    defaults = Layout().model_dump()
    changed = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in layout.model_dump().items()
        if value != defaults[name]
    }
    if not changed:
        return "layout=null"
    fields = ", ".join(f"{name}: {str(value).lower()}" for name, value in changed.items())
    return f"layout='{{{fields}}}'"

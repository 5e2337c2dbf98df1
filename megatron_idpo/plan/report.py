"""A plan as text for a terminal."""

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.console.text import format_duration
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import FRAGMENTATION, StageMemory
from megatron_idpo.plan.models import ModelFound
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import LONGEST, TYPICAL_PAIR_TOKENS, RunSizes
from megatron_idpo.plan.search import Found
from megatron_idpo.plan.step_time import LABEL, step_time

MAX_COLUMNS = 8
"""Stages that fit next to each other."""

MAX_FOUND = 10

_NAMES = {
    "weights": "weights",
    "adapters": "adapters",
    "head_copies": "copies of the head",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "activations": "activations",
    "temporaries": "temporaries of backward",
    "gathered": "gathered keys and values",
    "cublas": "cuBLAS workspace",
    "context": "CUDA context, process",
    "nccl": "NCCL buffers",
    "fragmentation": f"fragmentation, {FRAGMENTATION:.0%}",
}
"""Components in the order of the table; those of 0 on every stage are left out."""


def format_gb(size_bytes: float) -> str:
    """`34.2`, in units of 10⁹ bytes."""
    return f"{size_bytes / 1e9:.1f}"


def print_plan(plan: Plan, model: ModelFound, console: Console) -> None:
    """The whole plan."""
    _print(console, _heading(plan.run, plan.device, model))
    console.print(_memory_table(plan))
    warnings = [f"Warning: {line}." for line in plan.warnings()]
    _print(console, [_verdict(plan), *warnings, "", *_time_lines(plan), "", *_advice_lines(plan)])
    _print(console, [*_other_lengths(plan), *_assumptions(plan.run)])


def print_search(
    found: Sequence[Found], run: RunSizes, device: Device, model: ModelFound, console: Console
) -> None:
    """The fastest layouts that fit."""
    _print(console, [_model_line(run, model), f"{run.world_size} × {device.name}", ""])
    table = _table()
    for head in ("", "step s", "GB", "MFU", "pairs/s", "what it waits for", "settings"):
        is_text = head in ("what it waits for", "settings")
        table.add_column(head, justify="left" if is_text else "right", overflow="fold")
    for rank, one in enumerate(found[:MAX_FOUND], start=1):
        time = one.plan.time
        table.add_row(
            f"{rank}{'*' if one.is_in_file else ''}",
            format_step(time.step),
            format_gb(one.plan.largest.total) + "!" * one.plan.is_tight,
            f"{time.mfu:.0%}",
            f"{time.pairs_per_s:.1f}",
            Text(one.limit),
            Text("\n".join(one.settings) or "as in the file"),
        )
    console.print(table)
    others = f"{len(found)} layouts fit" + (f", {MAX_FOUND} shown" * (len(found) > MAX_FOUND))
    lines = [
        f"{others}. GB: the largest stage, of {format_gb(device.memory_bytes)}; !: less than "
        f"{device.headroom:.0%} free. *: the file's layout. Settings are added to the file's; "
        "layout=... replaces its section.",
        f"Time: {LABEL}.",
    ]
    _print(console, lines + _assumptions(run))


def format_step(seconds: float) -> str:
    """`0.174`, `12.3`: three digits."""
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def does_not_fit(plan: Plan) -> str:
    """What is too large, for an error."""
    largest = plan.largest
    needed, available = format_gb(largest.total), format_gb(plan.device.memory_bytes)
    where = f"stage {largest.stage} needs" if plan.run.layout.pipeline > 1 else "a GPU needs"
    parts = {name: size for name, size in largest.components().items() if name in _NAMES}
    most = sorted(parts, key=lambda name: parts[name], reverse=True)[:3]
    named = ", ".join(f"{_NAMES[name]} {format_gb(parts[name])}" for name in most)
    return f"{where} {needed} GB of {available} ({named})"


def _heading(run: RunSizes, device: Device, model: ModelFound) -> list[str]:
    layout = run.layout
    product = f"tensor {layout.tensor} × pipeline {layout.pipeline}"
    product += f" × context {layout.context}" * (layout.context > 1)
    product += f" × data {run.data}"
    product += f", {layout.virtual_pipeline} chunks per stage" * (layout.virtual_pipeline > 1)
    product += f", experts over {layout.expert}" * (layout.expert > 1)
    product += ", sequence parallel" * layout.sequence_parallel
    return [_model_line(run, model), f"{run.world_size} × {device.name}: {product}", ""]


def _model_line(run: RunSizes, model: ModelFound) -> str:
    trained = "all weights" if run.lora is None else f"LoRA rank {run.lora.rank}"
    taps = f"taps at {', '.join(map(str, run.taps))}" if run.taps else "no taps"
    sizes = model.sizes
    text = (
        f"{sizes.family}, {sizes.parameters / 1e9:.1f} B parameters ({model.source}); {run.dtype}"
    )
    return f"{text}, {trained}, {taps}, recompute {_recompute(run)}"


def _recompute(run: RunSizes) -> str:
    return run.recompute + f" of {run.recompute_layers} layers" * bool(run.recompute_layers)


def _shown(plan: Plan) -> list[StageMemory]:
    """Every stage, or the first, the largest and the last."""
    if len(plan.memory) <= MAX_COLUMNS:
        return list(plan.memory)
    chosen = {0, plan.largest.stage, len(plan.memory) - 1}
    return [plan.memory[stage] for stage in sorted(chosen)]


def _memory_table(plan: Plan) -> Table:
    stages = _shown(plan)
    table = _table()
    table.add_column("GB on one GPU" if plan.device.is_gpu else "GB in one process")
    has_stages = plan.run.layout.pipeline > 1
    for stage in stages:
        table.add_column(f"stage {stage.stage}" if has_stages else "", justify="right")

    def row(name: str, cells: list[str], style: str = "") -> None:
        table.add_row(name, *cells, style=style)

    row("layers", [str(stage.layers) for stage in stages])
    row("rows in flight", ["+".join(map(str, stage.rows_in_flight)) for stage in stages])
    for field, name in _NAMES.items():
        values = [getattr(stage, field) for stage in stages]
        if any(abs(value) >= 5e6 for value in values):
            if field == "context" and not plan.device.is_gpu:
                name = "process"
            row(name, [f"{value / 1e9:.2f}" for value in values])
    for field, name in (("update", "temporaries of the update"), ("reference_pass", "reference")):
        # They count only where they are larger than activations and temporaries together.
        extra = [_beyond_backward(stage, field) for stage in stages]
        if any(extra):
            row(f"{name}, beyond backward", [f"{value / 1e9:.2f}" for value in extra])
    row("total", [f"{stage.total / 1e9:.2f}" for stage in stages], style="bold")
    return table


def _beyond_backward(stage: StageMemory, field: str) -> float:
    backward = stage.activations + stage.temporaries + stage.gathered
    largest = max(("update", "reference_pass"), key=lambda name: getattr(stage, name))
    return max(getattr(stage, field) - backward, 0.0) if field == largest else 0.0


def _verdict(plan: Plan) -> str:
    available = format_gb(plan.device.memory_bytes)
    if plan.fits and plan.is_tight:
        return f"Fits, but tightly: {format_gb(plan.largest.total)} of {available} GB."
    if plan.fits:
        return f"Fits: {format_gb(plan.largest.total)} of {available} GB."
    return f"Does not fit: {does_not_fit(plan)}."


def _time_lines(plan: Plan) -> list[str]:
    time = plan.time
    rows = f"{time.rows} rows per replica, {time.work.row_tokens:,} positions each, "
    rows += f"{time.work.used_share:.0%} of them used"
    lines = [f"Step: {format_step(time.step)} s ({LABEL}), {rows}"]
    lines += [
        f"  {seconds:8.3f} s  {name}" for name, seconds in time.parts().items() if seconds > 5e-4
    ]
    row = time.stages[time.slowest]
    if row.host > row.gpu:
        lines.append(
            f"  bound by the host: {row.host / row.gpu:.1f} times the device's time per row"
        )
    if len(time.stages) > 1:
        imbalance = f"stage {time.slowest} is the slowest: {time.imbalance:.2f} of the mean"
        lines.append(f"  {imbalance}")
    lines.append(f"  {time.pairs_per_s:.1f} pairs/s, MFU {time.mfu:.0%}" + _duration(plan))
    return lines


def _other_lengths(plan: Plan) -> list[str]:
    """The step with typical pairs, where the longest possible ones are assumed."""
    run = plan.run
    if run.assumed.origin != LONGEST:
        return []
    assumed = replace(run.assumed, pair_tokens=TYPICAL_PAIR_TOKENS)
    time = step_time(replace(run, assumed=assumed), plan.device)
    return [
        f"With {TYPICAL_PAIR_TOKENS} positions per pair a step would take "
        f"{format_step(time.step)} s, {time.pairs_per_s:.1f} pairs/s: give --pair-tokens."
    ]


def _duration(plan: Plan) -> str:
    pairs = plan.run.trained_pairs
    if plan.days is None or pairs is None:
        return ""
    days = f" = {plan.days:.1f} days" if plan.days > 0.1 else ""
    text = f"; {pairs:,} pairs in {format_duration(plan.days * 86400)}{days}"
    if plan.cache_s:
        text += f", {format_duration(plan.cache_s)} of it for the reference before the first step"
    return text


def _advice_lines(plan: Plan) -> list[str]:
    advice = plan.advice()
    if advice:
        together = " (together)" if len(advice) > 1 else ""
        return [f"Advice{together}", *(f"  {one.setting}: {one.reason}" for one in advice), ""]
    run = plan.run
    reasons = []
    if run.recompute == "off":
        reasons.append("recomputation is off")
    elif plan.fits:
        reasons.append("no fewer recomputed layers fit")
    if run.layout.pipeline > 1:
        reasons.append("no other split or number of chunks makes the step 0.5 % shorter")
    if not reasons:
        return []
    return [f"No advice: {', '.join(reasons)}. `--search` compares other layouts.", ""]


def _assumptions(run: RunSizes) -> list[str]:
    assumed = run.assumed
    origin = assumed.origin or "--pair-tokens"
    text = f"Assumed: {assumed.pair_tokens:,} positions per pair ({origin}), "
    text += f"{assumed.scored_share:.0%} of them scored; memory is that of full rows."
    return [text]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _print(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)

"""Facts about a run: what was trained on what, its results, its speed, its settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.console.text import format_duration, format_number
from megatron_idpo.evaluate.report.inputs import RunInputs
from megatron_idpo.figures.numbers import UNKNOWN, count, decimal, interval, percent
from megatron_idpo.sdpo.manifest import FIRST
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics import names
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.intervals import wilson_interval

_WARMUP_STEPS = 2
"""The first steps compile and allocate; rates leave them out."""

_OUTPUT = "training.output"
"""Differs between any two runs."""

_HELD_OUT = (f"{names.EVAL}{names.ACCURACY}", f"{names.EVAL}{names.MARGIN}")


@dataclass(frozen=True, slots=True)
class Fact:
    """A value with its name, and a note in small print."""

    name: str
    value: str
    note: str = ""


# ---- results ----------------------------------------------------------------------------------


def result_facts(run: RunInputs) -> list[Fact]:
    """Held-out accuracy and margin before and after training, time, speed, memory."""
    speed = mean_speed(run.records)
    facts = [
        *_held_out_facts(run),
        *_first_model_facts(run),
        Fact("Time of steps", duration(speed.seconds), "without evaluations and checkpoints"),
        Fact("Tokens per second", _rate(speed.means.get(names.TOKENS_PER_S)), "all devices"),
        Fact("Peak memory", _memory(speed.peak_gb), "of the fullest rank"),
    ]
    return [fact for fact in facts if fact.value != UNKNOWN]


def _held_out_facts(run: RunInputs) -> list[Fact]:
    measured = [
        [record[name] for name in _HELD_OUT]
        for record in run.records
        if all(name in record for name in _HELD_OUT)
    ]
    if not measured:
        return []
    share, margin = measured[-1]
    last = next(record for record in reversed(run.records) if _HELD_OUT[0] in record)
    notes = [_interval_note(share, margin, last.get(names.EVAL_PAIRS, math.nan))]
    if run.manifest is not None:
        notes.append("each against its own step's reference")
    before, before_margin = "", ""
    if len(measured) > 1:
        before = f"{accuracy_percent(*measured[0])} → "
        before_margin = f"{decimal(measured[0][1], '+.3f') if measured[0][1] else '0'} → "
    value = f"{before}{accuracy_percent(share, margin)}"
    return [
        Fact("Held-out accuracy", value, "; ".join(filter(None, notes))),
        Fact("Held-out margin", f"{before_margin}{decimal(margin, '+.3f')}", "final layer"),
    ]


def _first_model_facts(run: RunInputs) -> list[Fact]:
    """The result of all sDPO steps together."""
    steps = run.manifest.steps if run.manifest else ()
    metrics = [step.metrics for step in steps if f"{FIRST}{_HELD_OUT[1]}" in step.metrics]
    if not metrics:
        return []
    share, margin = (metrics[-1].get(f"{FIRST}{name}", math.nan) for name in _HELD_OUT)
    note = _interval_note(share, margin, metrics[-1].get(f"{FIRST}{names.EVAL_PAIRS}", math.nan))
    value = f"{accuracy_percent(share, margin)}, margin {decimal(margin, '+.3f')}"
    return [Fact("Against the first model", value, note)]


def accuracy_percent(share: float, margin: float) -> str:
    """`78 %`; `tied` where policy and reference are equal, so that no answer is preferred."""
    return "tied" if is_tied(share, margin) else percent(share)


def _interval_note(share: float, margin: float, pairs: float) -> str:
    if is_tied(share, margin) or not math.isfinite(share + pairs):
        return ""
    low, high = (100 * bound for bound in wilson_interval(share, pairs))
    return f"95 % interval {interval(low, high, '.0f')} %, {count(pairs)} pairs"


# ---- speed ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed and memory of training."""

    seconds: float
    """Of all steps."""

    means: Mapping[str, float]
    """By metric name, without the first steps."""

    peak_gb: float


def mean_speed(records: Sequence[Record]) -> Speed:
    """Means of what was logged; each line counts by the time of the steps that it covers."""
    previous_step, weighted = 0.0, []
    for record in records:
        step_s = record.get(names.STEP_S, math.nan)
        if math.isfinite(step_s):
            weighted.append((record, step_s * (record[STEP] - previous_step)))
            previous_step = record[STEP]
    steady = [(r, s) for r, s in weighted if r[STEP] > _WARMUP_STEPS] or weighted
    means = {}
    for name in _SPEED_NAMES:
        known = [(r[name], s) for r, s in steady if math.isfinite(r.get(name, math.nan))]
        if seconds := math.fsum(s for _, s in known):
            means[name] = math.fsum(value * s for value, s in known) / seconds
    peaks = [record.get(names.PEAK_GB, math.nan) for record in records]
    total_s = math.fsum(seconds for _, seconds in weighted) if weighted else math.nan
    return Speed(total_s, means, max(filter(math.isfinite, peaks), default=math.nan))


def speed_facts(records: Sequence[Record]) -> list[Fact]:
    """All that is known of speed and memory."""
    speed = mean_speed(records)
    facts = [Fact("Time of all steps", duration(speed.seconds))]
    facts += [
        Fact(title, text(speed.means.get(name, math.nan)))
        for name, (title, text) in _SPEED_NAMES.items()
    ]
    facts.append(Fact("Peak memory", _memory(speed.peak_gb)))
    return [fact for fact in facts if fact.value != UNKNOWN]


def duration(seconds: float) -> str:
    """`3:12 min`, `1:02:05 h`, `2d 03:00`; below a minute `42 s`."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.5:
        digits = 2 if seconds < 0.995 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{digits}f} s"
    text = format_duration(seconds)
    return text if "d" in text else f"{text} {'h' if text.count(':') == 2 else 'min'}"


def _rate(value: float | None) -> str:
    return format_number(value) if value is not None and math.isfinite(value) else UNKNOWN


def _memory(peak_gb: float) -> str:
    return f"{decimal(peak_gb, '.1f')} GB" if math.isfinite(peak_gb) else UNKNOWN


def _flops(tera: float) -> str:
    if not math.isfinite(tera):
        return UNKNOWN
    return f"{_rate(tera)} TFLOP/s" if tera >= 1 else f"{_rate(1000 * tera)} GFLOP/s"


_SPEED_NAMES = {
    names.STEP_S: ("A step", duration),
    names.TOKENS_PER_S: ("Tokens per second", _rate),
    names.PAIRS_PER_S: ("Pairs per second", _rate),
    names.ROW_FILL: ("Rows filled", lambda share: percent(share, 1)),
    names.TFLOPS: ("Operations per device", _flops),
    names.MFU: ("Model FLOP utilization", lambda share: percent(share, 1)),
}


# ---- what was trained -------------------------------------------------------------------------


def run_facts(run: RunInputs) -> list[Fact]:
    """What was trained on what, and how; for an evaluation alone, its models."""
    if not run.is_run:
        return [Fact("Evaluated", ", ".join(run.evaluation.models))]
    sections = {
        name: section for name, section in run.config.items() if isinstance(section, Mapping)
    }
    facts = [_model_fact(run, sections.get("model", {})), _data_fact(run, sections)]
    if "objective" in sections:
        facts.append(_objective_fact(run, sections["objective"]))
    if lora := sections.get("lora"):
        rank, alpha, dropout, targets = (
            format_value(lora.get(name)) for name in ("rank", "alpha", "dropout", "targets")
        )
        note = f"α {alpha}, dropout {dropout}, on {targets}"
        facts.append(Fact("Trained", f"LoRA, rank {rank}", note))
    elif sections:
        facts.append(Fact("Trained", "All weights"))
    if layout := sections.get("layout"):
        facts.append(_layout_fact(layout))
    if optimizer := sections.get("optimizer"):
        value = f"AdamW, lr {format_value(optimizer.get('lr'))}"
        facts.append(Fact("Optimizer", value, f"schedule {optimizer.get('schedule', 'cosine')}"))
    versions = {
        "megatron-idpo": run.manifest.version if run.manifest else None,
        "transformers": run.model.get("transformers_version"),
    }
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return [fact for fact in [*facts, Fact("Written by", text)] if fact.value]


def _model_fact(run: RunInputs, section: Mapping[str, Any]) -> Fact:
    path = section.get("path") or (run.manifest.model if run.manifest else "")
    depth = run.model.get("num_hidden_layers")
    notes = (run.model.get("model_type"), f"{depth} layers" if depth else "", section.get("dtype"))
    return Fact("Model", _short_path(str(path)), ", ".join(str(note) for note in notes if note))


def _data_fact(run: RunInputs, sections: Mapping[str, Any]) -> Fact:
    sources = sections.get("data", {}).get("train")
    sources = sources if isinstance(sources, list) else []
    paths = [source.get("path") if isinstance(source, Mapping) else source for source in sources]
    notes = []
    num_steps = max((record[STEP] for record in run.records), default=0)
    if num_steps and (batch := sections.get("training", {}).get("global_batch_pairs")):
        notes.append(f"{count(num_steps)} steps of {batch} pairs")
    epochs = [record[names.EPOCH] for record in run.records if names.EPOCH in record]
    if run.manifest is not None:
        pairs = ", ".join(f"{step.pairs:,}" for step in run.manifest.steps)
        notes.append(f"{len(run.manifest.steps)} sDPO steps: {pairs} pairs")
    elif epochs:
        notes.append(f"{epochs[-1]:.3g} epoch{'' if epochs[-1] == 1 else 's'}")
    return Fact("Pairs", ", ".join(_short_path(str(path)) for path in paths), "; ".join(notes))


def _objective_fact(run: RunInputs, objective: Mapping[str, Any]) -> Fact:
    layers, configured = run.layers, objective.get("layers")
    note = f"{objective.get('loss', 'sigmoid')} loss, β {format_value(objective.get('beta'))}"
    if not configured and not layers:
        value = "DPO at the final layer alone"
        return Fact("Objective", f"sDPO, {value}" if run.manifest else value, note)
    text = ", ".join(map(str, layers)) or format_value(configured)
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        text = f"{layers[0]} to {layers[-1]}"
    depth = run.model.get("num_hidden_layers")
    value = f"layer{'s' if len(layers) > 1 else ''} {text}" + (f" of {depth}" if depth else "")
    kind = "sDPO, intermediate DPO" if run.manifest else "Intermediate DPO"
    weight = objective.get("intermediate_weight")
    if weight is not None:
        note += f", intermediate weight {format_value(weight)}"
    return Fact("Objective", f"{kind} at {value}", note)


def _layout_fact(layout: Mapping[str, Any]) -> Fact:
    sizes = ("tensor", "pipeline", "virtual_pipeline", "expert")
    split = [f"{n.replace('_', ' ')} {layout[n]}" for n in sizes if layout.get(n, 1) != 1]
    note = "sequence parallel" if layout.get("sequence_parallel") else ""
    return Fact("Layout", " × ".join(split) or "whole model in each process", note)


def _short_path(path: str) -> str:
    """The last part of a path; hub names as they are."""
    return path if path.count("/") <= 1 else Path(path).name


# ---- settings ---------------------------------------------------------------------------------


def non_default_settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Fields without a default, or with another value."""
    fields = _fields(config, exclude_defaults=True)
    return [(name, format_value(value)) for name, value in fields.items()]


def different_settings(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Fields in which configurations differ, with the value in each.

    A section that some lack (LoRA, sDPO) has a row, and its non-default fields.
    """
    rows = [
        (section, ["yes" if section in config else UNKNOWN for config in configs])
        for section in dict.fromkeys(name for config in configs for name in config)
        if not all(section in config for config in configs)
    ]
    every = [_fields(config, exclude_defaults=False) for config in configs]
    short = [_fields(config, exclude_defaults=True) for config in configs]
    for name in dict.fromkeys(name for fields in every for name in fields):
        present = [fields[name] for fields in every if name in fields]
        is_same = all(value == present[0] for value in present)
        if len(present) < len(configs):
            is_same = not any(name in fields for fields in short)
        if name != _OUTPUT and not is_same:
            pairs = zip(short, every, strict=True)
            values = [fields.get(name, full.get(name)) for fields, full in pairs]
            texts = [
                format_value(value) if name in fields else UNKNOWN
                for value, fields in zip(values, every, strict=True)
            ]
            rows.append((name, texts))
    return rows


def _fields(config: Mapping[str, Any], *, exclude_defaults: bool) -> dict[str, Any]:
    """`section.field` -> value; fields of other versions of this package as they are."""
    fields: dict[str, Any] = {}
    for name, values in config.items():
        if not isinstance(values, Mapping):
            continue
        try:
            section = section_class(RunConfig.model_fields[name]).model_validate(values)
            values = section.model_dump(mode="json", exclude_defaults=exclude_defaults)
        except (KeyError, ValueError):
            pass
        fields |= {f"{name}.{field}": value for field, value in values.items()}
    return fields


def format_value(value: Any) -> str:
    """A value of a configuration."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case [Mapping(), *_]:
            only_path = [entry["path"] if set(entry) == {"path"} else entry for entry in value]
            return "; ".join(map(format_value, only_path))
        case list() | tuple():
            return ", ".join(map(format_value, value)) or "none"
        case Mapping():
            parts = [f"{name.replace('_', ' ')} {format_value(v)}" for name, v in value.items()]
            return ", ".join(parts) or "none"
    return str(value)

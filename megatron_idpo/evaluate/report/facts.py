"""Facts about a run: what was trained on what, its results, its speed, its settings."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.console.text import format_duration, format_number
from megatron_idpo.evaluate.report.inputs import RunInputs
from megatron_idpo.evaluate.report.tables import Cell
from megatron_idpo.figures.numbers import UNKNOWN, count, decimal, interval, percent
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics import names
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.intervals import wilson_interval
from megatron_idpo.train.starts import Start

type Facts = dict[str, Cell]
"""Name -> value, with a note in small print."""

_WARMUP_STEPS = 2
"""The first steps compile and allocate; rates leave them out."""

_OUTPUT = "training.output"
"""Differs between any two runs."""

_LORA = ("rank", "alpha", "dropout", "targets")
"""Shown also with their default."""

_HELD_OUT = (f"{names.EVAL}{names.ACCURACY}", f"{names.EVAL}{names.MARGIN}")


# ---- results ----------------------------------------------------------------------------------


def result_facts(run: RunInputs) -> Facts:
    """Held-out accuracy and margin before and after training."""
    return _held_out_facts(run) | _first_model_facts(run)


def cost_facts(run: RunInputs) -> Facts:
    """Time, speed and memory of training."""
    speed = speed_facts(run.records)
    shown = ("Time of steps", "Tokens/s", "Peak memory")
    return {name: speed[name] for name in shown if name in speed}


def _held_out_facts(run: RunInputs) -> Facts:
    measured = [record for record in run.records if all(name in record for name in _HELD_OUT)]
    if not measured:
        return {}
    last = measured[-1]
    notes = [_interval_note(last)]
    if run.manifest is not None:
        notes.append("each against its own step's reference")
    shares, margins = [], []
    for record in [measured[0], last] if len(measured) > 1 else [last]:
        share, margin = (record[name] for name in _HELD_OUT)
        shares.append(accuracy_percent(share, margin))
        margins.append(decimal(margin, "+.3f") if margin else "0")
    return {
        "Held-out accuracy": Cell(" → ".join(shares), "; ".join(filter(None, notes))),
        "Held-out margin": Cell(" → ".join(margins), "final layer"),
    }


def _first_model_facts(run: RunInputs) -> Facts:
    """The result of all sDPO steps together."""
    metrics = run.against_first
    if not metrics:
        return {}
    share, margin = (metrics.get(name, math.nan) for name in _HELD_OUT)
    value = f"{accuracy_percent(share, margin)}, margin {decimal(margin, '+.3f')}"
    return {"Against the first model": Cell(value, _interval_note(metrics))}


def accuracy_percent(share: float, margin: float) -> str:
    """`78 %`; `tied` where policy and reference are equal, so that no answer is preferred."""
    return "tied" if is_tied(share, margin) else percent(share)


def _interval_note(metrics: Mapping[str, float]) -> str:
    share, margin = (metrics.get(name, math.nan) for name in _HELD_OUT)
    pairs = metrics.get(names.EVAL_PAIRS, math.nan)
    if is_tied(share, margin) or not math.isfinite(share + pairs):
        return ""
    low, high = (100 * bound for bound in wilson_interval(share, pairs))
    return f"95 % interval {interval(low, high, '.0f')} %, {count(pairs)} pairs"


# ---- speed ------------------------------------------------------------------------------------


def speed_facts(records: Sequence[Record]) -> Facts:
    """Time, throughput and memory of training, as far as they are known.

    Means leave out the first steps; a logged line counts by the time of the steps that it covers.
    """
    facts: Facts = {}
    timed = [record for record in records if record.get(names.STEP_S, math.nan) > 0]
    steps = np.diff([record[STEP] for record in timed], prepend=0)
    weighted = [(r, n * r[names.STEP_S]) for r, n in zip(timed, steps, strict=True)]
    if weighted:
        total = duration(sum(seconds for _, seconds in weighted))
        facts["Time of steps"] = Cell(total, "optimizer steps only")
    steady = [(r, seconds) for r, seconds in weighted if r[STEP] > _WARMUP_STEPS] or weighted
    for name, (title, text, note) in _SPEED.items():
        known = [(r[name], s) for r, s in steady if math.isfinite(r.get(name, math.nan))]
        if known:
            values, seconds = zip(*known, strict=True)
            facts[title] = Cell(text(float(np.average(values, weights=seconds))), note)
    peaks = [record[names.PEAK_GB] for record in records if names.PEAK_GB in record]
    if known_peaks := list(filter(math.isfinite, peaks)):
        facts["Peak memory"] = Cell(f"{max(known_peaks):.1f} GB", "fullest rank")
    return facts


def duration(seconds: float) -> str:
    """`3:12 min`, `1:02:05 h`, `2d 03:00`; below a minute `42 s`."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    text = format_duration(seconds)
    return text if "d" in text else f"{text} {'h' if text.count(':') == 2 else 'min'}"


_SPEED = {
    names.STEP_S: ("A step", duration, ""),
    names.TOKENS_PER_S: ("Tokens/s", format_number, "all devices"),
    names.PAIRS_PER_S: ("Pairs/s", format_number, ""),
    names.ROW_FILL: ("Rows filled", lambda share: percent(share, 1), ""),
    names.TFLOPS: ("Operations per device", lambda tera: f"{tera:.3g} TFLOP/s", ""),
    names.MFU: ("Model FLOP utilization", lambda share: percent(share, 1), ""),
}


# ---- what was trained -------------------------------------------------------------------------


def run_facts(run: RunInputs) -> Facts:
    """What was trained on what, and how; for an evaluation alone, its models."""
    if not (run.records or run.config or run.manifest):
        return {"Evaluated": Cell(", ".join(run.evaluation.models))}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in _fields(run.config, exclude_defaults=True).items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    facts = {
        "Model": _model_fact(run, run.config.get("model", {})),
        "Pairs": _data_fact(run, sections.get("data", {})),
    }
    if "objective" in run.config:
        facts["Objective"] = _objective_fact(run, run.config["objective"])
    if run.config:
        lora = run.config.get("lora") or {}
        shown = {name: lora[name] for name in _LORA if name in lora} | sections.get("lora", {})
        facts["Trained"] = Cell("LoRA", format_value(shown)) if lora else Cell("All weights")
    if "layout" in sections:
        facts["Layout"] = Cell(format_value(sections["layout"]))
    if "optimizer" in sections:
        facts["Optimizer"] = Cell("AdamW", format_value(sections["optimizer"]))
    return {name: fact for name, fact in facts.items() if fact.value}


def _model_fact(run: RunInputs, section: Mapping[str, Any]) -> Cell:
    path = section.get("path") or (run.manifest.model if run.manifest else "")
    depth = run.model.get("num_hidden_layers")
    notes = (run.model.get("model_type"), f"{depth} layers" if depth else "", section.get("dtype"))
    return Cell(_short_path(str(path)), ", ".join(str(note) for note in notes if note))


def _data_fact(run: RunInputs, section: Mapping[str, Any]) -> Cell:
    """The files, and how much of them was trained on."""
    files = [_short_path(format_value(source)) for source in section.get("train") or ()]
    notes = []
    if run.records:
        last = run.records[-1]
        notes.append(f"{count(last[STEP])} steps")
        if names.EPOCH in last:
            notes.append(f"epoch {last[names.EPOCH]:.3g}")
    if run.manifest is not None:
        pairs = ", ".join(f"{step.pairs:,}" for step in run.manifest.steps)
        notes.append(f"{len(run.manifest.steps)} sDPO steps: {pairs} pairs")
    return Cell("; ".join(files), "; ".join(notes))


def _objective_fact(run: RunInputs, objective: Mapping[str, Any]) -> Cell:
    layers = run.layers or objective.get("layers")
    note = f"{objective.get('loss', 'sigmoid')} loss, β {format_value(objective.get('beta'))}"
    if layers:
        text = format_value(layers)
        if len(run.layers) > 2 and run.layers[-1] - run.layers[0] == len(run.layers) - 1:
            text = f"{run.layers[0]} to {run.layers[-1]}"
        kind = "sDPO, intermediate DPO" if run.manifest else "Intermediate DPO"
        note += f", intermediate weight {format_value(objective.get('intermediate_weight'))}"
        return Cell(f"{kind} at layer{'s' if len(layers) > 1 else ''} {text}", note)
    kind = "sDPO, DPO" if run.manifest else "DPO"
    return Cell(f"{kind} at the final layer alone", note)


def _short_path(path: str) -> str:
    """The last part of a path; hub names as they are."""
    return path if path.count("/") <= 1 else Path(path).name


# ---- how it was run ----------------------------------------------------------------------------


def record_facts(run: RunInputs) -> Facts:
    """When, on what, with which command, versions and commit; of the last start, if several."""
    if not run.starts:
        return {}
    last = run.starts[-1]
    others = {
        "Device": [start.device for start in run.starts],
        "Commit": [start.commit or "" for start in run.starts],
        "Versions": [_versions(start) for start in run.starts],
        "Command": [start.command for start in run.starts],
    }
    facts = {"Started": _started_fact(run.starts), "Processes": Cell(count(last.processes))}
    for name, values in others.items():
        earlier = "; ".join(value for value in dict.fromkeys(values) if value != values[-1])
        facts[name] = Cell(values[-1], f"earlier: {earlier}" if earlier else "")
    return {name: fact for name, fact in facts.items() if fact.value}


def record_line(run: RunInputs) -> str:
    """`2026-11-29 10:45 UTC · 2 processes on NVIDIA H200 · commit b3e764c`, of the last start."""
    if not run.starts:
        return ""
    last = run.starts[-1]
    on = f"{count(last.processes)} {'process' if last.processes == 1 else 'processes'} on "
    package = f"megatron-idpo {last.versions.get('megatron-idpo', '')}".strip()
    parts = [_readable(last.time), on + last.device, package]
    return " · ".join([*parts, f"commit {last.commit}"] if last.commit else parts)


def _started_fact(starts: Sequence[Start]) -> Cell:
    """The first start; the number of later ones in the note."""
    resumed = len([start for start in starts if start.step])
    note = f"resumed {resumed} {'time' if resumed == 1 else 'times'}" if resumed else ""
    if resumed:
        note += f", last {_readable(starts[-1].time)} after step {starts[-1].step:,}"
    return Cell(_readable(starts[0].time), note)


def _readable(time: str) -> str:
    """`2026-11-29 10:45 UTC`."""
    return f"{time[:16].replace('T', ' ')} UTC"


def _versions(start: Start) -> str:
    return ", ".join(f"{name} {number}" for name, number in start.versions.items())


# ---- settings ---------------------------------------------------------------------------------


def shown_settings(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Fields with the value in each configuration.

    Of a single configuration the fields with another value than the default; of several, those of
    these fields that differ.
    """
    changed = [_fields(config, exclude_defaults=True) for config in configs]
    every = [_fields(config, exclude_defaults=False) for config in configs]
    rows = []
    for name in dict.fromkeys(name for fields in changed for name in fields):
        values = [
            format_value({**full, **short}.get(name, UNKNOWN))
            for short, full in zip(changed, every, strict=True)
        ]
        if len(configs) == 1 or (name != _OUTPUT and len(set(values)) > 1):
            rows.append((name, values))
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
        case None | bool():
            return json.dumps(value)
        case float():
            return f"{value:g}"
        case {"path": path} if len(value) == 1:
            return str(path)
        case [Mapping(), *_]:
            return "; ".join(map(format_value, value))
        case list() | tuple():
            return ", ".join(map(format_value, value)) or "none"
        case Mapping():
            parts = [f"{name.replace('_', ' ')} {format_value(v)}" for name, v in value.items()]
            return ", ".join(parts) or "none"
    return str(value)

"""The page's sections, each there only where there is something to show."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_idpo.evaluate.models import RUN_FILE
from megatron_idpo.evaluate.report.charts import Style
from megatron_idpo.evaluate.report.charts_curriculum import against_styles, curriculum_charts
from megatron_idpo.evaluate.report.charts_evaluation import (
    LEADING,
    SHOWN,
    duel_chart,
    duels_of,
    layer_charts,
    layer_lines,
)
from megatron_idpo.evaluate.report.charts_training import (
    DRAWN_LAYERS,
    Chart,
    speed_charts,
    training_charts,
    training_lines,
)
from megatron_idpo.evaluate.report.evaluation_inputs import Tasks
from megatron_idpo.evaluate.report.format import setting
from megatron_idpo.evaluate.report.headline_speed import speed_facts
from megatron_idpo.evaluate.report.inputs import Found
from megatron_idpo.evaluate.report.tables import (
    Table,
    all_layers_table,
    curriculum_table,
    duels_table,
    facts_table,
    final_layers_table,
    h4_table,
    layers_table,
    sources_table,
)
from megatron_idpo.figures.series import Series
from megatron_idpo.train.metrics.names import EVAL, LOSS


@dataclass(frozen=True, slots=True)
class Section:
    """Part of the page: words, charts with one legend, tables; long things folded."""

    identifier: str
    title: str
    words: Sequence[str] = ()
    legend: Sequence[tuple[str, Style]] = ()
    legend_note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded_charts: Sequence[Chart] = ()
    folded_tables: Sequence[tuple[str, Table]] = ()
    folded_text: Sequence[tuple[str, str]] = field(default_factory=tuple)


_MOST_ROWS = 8
"""Of a table that is not folded."""


def training_section(runs: Sequence[Found]) -> Section | None:
    """How training went."""
    charts = training_charts(runs)
    if not charts:
        return None
    lines = training_lines(runs)
    has_held_out = any(f"{EVAL}{LOSS}" in record for run in runs for record in run.records)
    window = max(Series.of(line.records, LOSS).window for line in lines)
    mean = f", running means of {window} logged lines" if window > 1 else ""
    note = f"Thin: training{mean}."
    note += " With marks: held-out pairs." if has_held_out else ""
    words = []
    if len(runs) > 1:
        words.append("Losses, margins and accuracies are the final layer's.")
    elif len(runs[0].layers) > DRAWN_LAYERS:
        words.append(f"{DRAWN_LAYERS} of {len(runs[0].layers)} intermediate layers are drawn.")
    table = layers_table(runs)
    is_long = table is not None and len(table.rows) > _MOST_ROWS
    return Section(
        "training",
        "Training",
        words=words,
        legend=[(line.label, line.style) for line in lines],
        legend_note=note,
        charts=charts,
        tables=[table] if table and not is_long else [],
        folded_tables=[("All layers in figures", table)] if table and is_long else [],
    )


def curriculum_sections(runs: Sequence[Found]) -> list[Section]:
    """The steps of each sDPO run."""
    found = []
    for number, run in enumerate(runs):
        if run.manifest is None:
            continue
        manifest = run.manifest
        start = {"previous": "the step before", "first": "the first model"}
        between = {
            "merge": " Adapters are merged between steps.",
            "carry": " Adapters are carried on.",
        }
        charts = curriculum_charts(manifest, f"curriculum-{number}")
        found.append(
            Section(
                f"curriculum-{number}",
                "Curriculum" if len(runs) == 1 else f"Curriculum of {run.label}",
                words=[
                    "Each step's reference is the step before; its policy starts from "
                    f"{start.get(manifest.target, manifest.target)}."
                    f"{between.get(manifest.adapters or '', '')} Intervals are 95 %."
                ],
                legend=[(f"against {message}", style) for _, message, style in against_styles()]
                if charts
                else (),
                charts=charts,
                tables=[curriculum_table(run), sources_table(run)],
            )
        )
    return found


def layers_section(runs: Sequence[Found]) -> Section | None:
    """What models make of held-out pairs at every layer."""
    lines = layer_lines(runs)
    if not lines:
        return None
    samples = {(line.curves.pairs, line.curves.prompts) for line in lines}
    message = "; ".join(f"{pairs:,} pairs of {prompts:,} prompts" for pairs, prompts in samples)
    several = len(runs) > 1
    advice = [
        (f"Which layers to tap{f': {run.label}' if several else ''}", run.evaluation.advice)
        for run in runs
        if run.evaluation.advice
    ]
    return Section(
        "layers",
        "Layers",
        words=[
            f"Held-out pairs read at every layer: {message}. Bands are 95 % intervals over prompts."
        ],
        legend=[(line.label, line.style) for line in lines],
        charts=layer_charts(lines, LEADING),
        tables=[final_layers_table(lines)],
        folded_charts=layer_charts(lines, [name for name in SHOWN if name not in LEADING]),
        folded_tables=[(f"Every layer of {line.label}", all_layers_table(line)) for line in lines],
        folded_text=advice,
    )


def duels_section(runs: Sequence[Found]) -> Section | None:
    """Who wins."""
    duels = duels_of(runs)
    if not duels:
        return None
    judged = [run for run in runs if run.evaluation.duels]
    words = [
        f"{run.label}: {duel.summary}" if len(judged) > 1 else duel.summary
        for run in judged
        for duel in run.evaluation.duels
    ]
    drawn = [(title, duel) for title, duel in duels if math.isfinite(duel.rate)]
    return Section(
        "wins",
        "Win rates",
        words=[word if word.endswith(".") else f"{word}." for word in words],
        charts=[duel_chart(drawn)] if drawn else [],
        tables=[duels_table(duels)],
    )


def h4_section(runs: Sequence[Found]) -> Section | None:
    """H4 of all models."""
    several = len(runs) > 1
    models = {
        f"{run.label} · {model}" if several else model: tasks
        for run in runs
        for model, tasks in run.evaluation.h4.items()
    }
    if not models:
        return None
    words = ["Percent, ± one standard error."]
    limits = sorted({tasks.limit for tasks in models.values() if tasks.limit is not None})
    if limits:
        message = " or ".join(f"{limit:,}" for limit in limits)
        words.append(
            f"Only the first {message} items of each task (of MMLU, of each subject): not "
            "comparable to others' figures."
        )
    return Section(
        "h4",
        "H4",
        words=[*words, *_h4_origins(models)],
        tables=[h4_table(models)],
    )


def _h4_origins(models: Mapping[str, Tasks]) -> list[str]:
    sources = dict.fromkeys(one.source for one in models.values() if one.source)
    versions = dict.fromkeys(one.version for one in models.values() if one.version)
    items = ", ".join("the hub" if source == "hub" else source for source in sources)
    message = [f"Items from {items}"] if items else []
    message += [f"lm-eval {', '.join(versions)}"] if versions else []
    return [f"{', '.join(message)}."] if message else []


def speed_section(runs: Sequence[Found]) -> Section | None:
    """Throughput and memory."""
    facts = {run.label: speed_facts(run.records) for run in runs if run.records}
    facts = {label: message for label, message in facts.items() if message}
    if not facts:
        return None
    lines = training_lines(runs)
    shown = facts if len(runs) > 1 else {"": next(iter(facts.values()))}
    return Section(
        "speed",
        "Throughput and memory",
        words=["Of training steps alone; means leave the first steps out, which compile."],
        legend=[(line.label, line.style) for line in lines] if len(runs) > 1 else (),
        charts=speed_charts(runs),
        tables=[facts_table(shown)],
    )


def missing(runs: Sequence[Found]) -> list[tuple[str, str]]:
    """What is not on the page, and the command that would add it."""
    wanted = {
        "Layer likelihoods": ("likelihood", lambda one: bool(one.evaluation.curves)),
        "Sample answers": ("generate", lambda one: bool(one.evaluation.answers)),
        "Win rates": ("judge", lambda one: bool(one.evaluation.duels)),
        "H4": ("h4", lambda one: bool(one.evaluation.h4)),
    }
    found = []
    for title, (verb, is_there) in wanted.items():
        without = [run for run in runs if not is_there(run)]
        if not without or (len(runs) > 1 and any(not run.is_run and is_there(run) for run in runs)):
            continue
        of = f" of {', '.join(run.label for run in without)}" if len(without) < len(runs) else ""
        config = "CONFIG.yaml"
        if len(without) == 1 and without[0].config:
            config = shlex.quote(str(without[0].root / RUN_FILE))
        found.append((f"{title}{of}", f"megatron-idpo {verb} {config}"))
    return found


def format_sampling(settings: Mapping[str, Any]) -> str:
    """How answers were sampled, in a line; empty where nobody knows."""
    sampling = settings.get("sampling")
    if not isinstance(sampling, Mapping):
        return ""
    return ", ".join(f"{name.replace('_', ' ')} {setting(v)}" for name, v in sampling.items())

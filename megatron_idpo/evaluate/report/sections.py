"""The sections of the page; each exists only if there is something to show."""

import math
import operator
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.models import RUN_FILE
from megatron_idpo.evaluate.report import tables
from megatron_idpo.evaluate.report.facts import format_value, speed_facts
from megatron_idpo.evaluate.report.inputs import Comparison, RunInputs, merge_models
from megatron_idpo.evaluate.report.tables import Table
from megatron_idpo.figures import training as charts
from megatron_idpo.figures.chart import Chart, Legend
from megatron_idpo.figures.evaluation import (
    LAYER_QUANTITIES,
    MAIN_QUANTITIES,
    REFERENCES,
    LayerLine,
    WinRate,
    layer_charts,
    result_charts,
    win_rate_chart,
)
from megatron_idpo.figures.style import series_style
from megatron_idpo.sdpo.curriculum_figure import curriculum_of
from megatron_idpo.train.metrics.curves import run_lines, training_line

MAX_LAYERS = 6
"""Intermediate layers that charts of a single run show."""

_MAX_ROWS = 8
"""Longer tables are folded."""

_STARTS = {"previous": "the step before", "first": "the first model"}
_ADAPTERS = {"merge": " Adapters are merged between steps.", "carry": " Adapters are kept."}


@dataclass(frozen=True, slots=True)
class Section:
    """Text, charts with one legend, tables; folded parts open on request."""

    identifier: str
    title: str
    text: Sequence[str] = ()
    legend: Legend = ()
    legend_note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded_charts: Sequence[Chart] = ()
    folded_tables: Sequence[tuple[str, Table]] = ()
    folded_text: Sequence[tuple[str, str]] = field(default_factory=tuple)


def training_lines(runs: Sequence[RunInputs]) -> list[charts.TrainingLine]:
    """Layers of a single run, else one line per run."""
    if len(runs) > 1:
        return [
            training_line(run.records, run.label, series_style(index))
            for index, run in enumerate(runs)
            if run.records
        ]
    (run,) = runs
    shown = np.linspace(0, len(run.layers) - 1, min(len(run.layers), MAX_LAYERS)).round()
    return run_lines(run.records, [run.layers[int(at)] for at in shown]) if run.records else []


def training_section(runs: Sequence[RunInputs]) -> Section | None:
    """Loss, margin, accuracy and gradient norm over steps."""
    lines = training_lines(runs)
    drawn = charts.training_charts(lines, (*charts.LAYER_QUANTITIES, charts.GRAD_NORM))
    if not drawn:
        return None
    text = []
    if len(runs) > 1:
        text.append("Losses, margins and accuracies are the final layer's.")
    elif len(runs[0].layers) > MAX_LAYERS:
        text.append(f"Shows {MAX_LAYERS} of {len(runs[0].layers)} intermediate layers.")
    table = tables.layers_table(runs)
    is_long = table is not None and len(table.rows) > _MAX_ROWS
    return Section(
        "training",
        "Training",
        text,
        legend=[(line.label, line.style) for line in lines],
        legend_note=charts.smoothing_note(lines),
        charts=drawn,
        tables=[table] if table and not is_long else [],
        folded_tables=[("Table of all layers", table)] if table and is_long else [],
    )


def curriculum_sections(runs: Sequence[RunInputs]) -> list[Section]:
    """The steps of each sDPO run."""
    sections = []
    for index, run in enumerate(runs):
        if (manifest := run.manifest) is None:
            continue
        drawn = result_charts(curriculum_of(manifest))
        text = (
            "Each step's reference is the step before; its policy starts from "
            f"{_STARTS.get(manifest.target, manifest.target)}."
            f"{_ADAPTERS.get(manifest.adapters or '', '')} Intervals are 95 %."
        )
        sections.append(
            Section(
                f"curriculum-{index}",
                "Curriculum" if len(runs) == 1 else f"Curriculum of {run.label}",
                [text],
                legend=REFERENCES if drawn else (),
                charts=drawn,
                tables=[tables.curriculum_table(manifest), tables.sources_table(manifest)],
            )
        )
    return sections


def layer_curves(runs: Sequence[RunInputs]) -> dict[str, LayerCurves]:
    """The layer curves of all runs by label."""
    return merge_models(
        runs, lambda run: {curves.model: curves for curves in run.evaluation.curves}, _is_same
    )


def _is_same(one: LayerCurves, other: LayerCurves) -> bool:
    """Whether both are of the same weights and pairs."""
    if (one.layers, one.pairs, one.prompts) != (other.layers, other.pairs, other.prompts):
        return False
    return all(
        np.array_equal(estimate.value_L, other.estimates[name].value_L, equal_nan=True)
        for name, estimate in one.estimates.items()
    )


def layers_section(runs: Sequence[RunInputs]) -> Section | None:
    """Layer curves of held-out pairs."""
    models = layer_curves(runs)
    if not models:
        return None
    lines = [
        LayerLine(label, series_style(index), curves.estimates)
        for index, (label, curves) in enumerate(models.items())
    ]
    samples = "; ".join(sorted({curves.format_sample for curves in models.values()}))
    return Section(
        "layers",
        "Layers",
        [f"{samples}, read at every layer. Bands are 95 % intervals over prompts."],
        legend=[(line.label, line.style) for line in lines],
        charts=layer_charts(lines, MAIN_QUANTITIES),
        tables=[tables.final_layers_table(models)],
        folded_charts=layer_charts(
            lines, [name for name in LAYER_QUANTITIES if name not in MAIN_QUANTITIES]
        ),
        folded_tables=[
            (f"Every layer of {label}", tables.all_layers_table(curves))
            for label, curves in models.items()
        ],
        folded_text=[
            (f"Which layers to tap{f': {run.label}' if len(runs) > 1 else ''}", advice)
            for run in runs
            if (advice := run.evaluation.advice)
        ],
    )


def comparisons(runs: Sequence[RunInputs]) -> list[tuple[RunInputs, str, Comparison]]:
    """All comparisons, each with a prefix that names its run where several runs have some."""
    compared = [run for run in runs if run.evaluation.comparisons]
    return [
        (run, f"{run.label}: " if len(compared) > 1 else "", comparison)
        for run in compared
        for comparison in run.evaluation.comparisons
    ]


def wins_section(runs: Sequence[RunInputs]) -> Section | None:
    """Win rates."""
    judged = comparisons(runs)
    if not judged:
        return None
    titled = {
        f"{prefix}{comparison.a} against {comparison.b}": comparison
        for _, prefix, comparison in judged
    }
    rates = [
        WinRate(title, comparison.win_rate, comparison.low, comparison.high)
        for title, comparison in titled.items()
        if math.isfinite(comparison.win_rate)
    ]
    return Section(
        "wins",
        "Win rates",
        [f"{prefix}{comparison.summary.removesuffix('.')}." for _, prefix, comparison in judged],
        charts=[win_rate_chart(rates)] if rates else [],
        tables=[tables.wins_table(titled)],
    )


def h4_section(runs: Sequence[RunInputs]) -> Section | None:
    """H4 of all models."""
    models = merge_models(runs, lambda run: run.evaluation.h4, operator.eq)
    if not models:
        return None
    text = ["Percent, ± one standard error."]
    if limits := sorted({result.settings["limit"] or 0 for result in models.values()} - {0}):
        items = " or ".join(f"{limit:,}" for limit in limits)
        text.append(
            f"Only the first {items} items of each task (of MMLU, of each subject): not "
            "comparable to published values."
        )
    sources = dict.fromkeys(result.source.replace("hub", "the hub") for result in models.values())
    versions = dict.fromkeys(result.settings["lm_eval"] for result in models.values())
    text.append(f"Items from {', '.join(sources)}, lm-eval {', '.join(versions)}.")
    return Section("h4", "H4", text, tables=[tables.h4_table(models)])


def speed_section(runs: Sequence[RunInputs]) -> Section | None:
    """Throughput and memory."""
    facts = {run.label: facts for run in runs if (facts := speed_facts(run.records))}
    if not facts:
        return None
    lines, several = training_lines(runs), len(runs) > 1
    return Section(
        "speed",
        "Throughput and memory",
        ["Training steps only; means leave out the first steps, which compile."],
        legend=[(line.label, line.style) for line in lines] if several else (),
        charts=charts.training_charts(lines, (charts.TOKENS_PER_S, charts.PEAK_GB)),
        tables=[tables.facts_table(facts if several else {"": next(iter(facts.values()))})],
    )


def missing(runs: Sequence[RunInputs]) -> list[tuple[str, str]]:
    """What the page lacks, and the command that would add it."""
    parts = {
        "Layer likelihoods": ("likelihood", "curves"),
        "Sample answers": ("generate", "answers"),
        "Win rates": ("judge", "comparisons"),
        "H4": ("h4", "h4"),
    }
    commands = []
    for title, (verb, name) in parts.items():
        without = [run for run in runs if not getattr(run.evaluation, name)]
        # Runs that were evaluated together have nothing in their own directories.
        together = any(not run.is_run and run not in without for run in runs)
        if not without or together:
            continue
        of = f" of {', '.join(run.label for run in without)}" if len(without) < len(runs) else ""
        config = "CONFIG.yaml"
        if len(without) == 1 and without[0].config:
            config = shlex.quote(str(without[0].root / RUN_FILE))
        commands.append((f"{title}{of}", f"megatron-idpo {verb} {config}"))
    return commands


def format_sampling(settings: Mapping[str, Any]) -> str:
    """How answers were sampled; empty if not known."""
    sampling = settings.get("sampling")
    return format_value(sampling) if isinstance(sampling, Mapping) else ""

"""The sections of the page; each exists only if there is something to show."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.evaluate.models import RUN_FILE
from megatron_idpo.evaluate.report import tables
from megatron_idpo.evaluate.report.facts import (
    format_value,
    record_facts,
    shown_settings,
    speed_facts,
)
from megatron_idpo.evaluate.report.inputs import RunInputs, comparisons, merge_models
from megatron_idpo.evaluate.report.samples import Sample, answer_sets, select_samples
from megatron_idpo.evaluate.report.tables import Cell, Table
from megatron_idpo.figures import training as charts
from megatron_idpo.figures.chart import Chart, Legend, series_legend
from megatron_idpo.figures.evaluation import (
    MAIN_QUANTITIES,
    OTHER_QUANTITIES,
    REFERENCES,
    layer_charts,
    result_charts,
    win_rate_chart,
)
from megatron_idpo.figures.style import series_style
from megatron_idpo.sdpo.curriculum_figure import curriculum_of
from megatron_idpo.train.metrics.curves import run_lines, training_line

MAX_LAYERS = 6
"""Intermediate layers that charts of a single run show."""

_STARTS = {"previous": "the step before", "first": "the first model"}
_ADAPTERS = {"merge": " Adapters are merged between steps.", "carry": " Adapters are kept."}


@dataclass(frozen=True, slots=True)
class Section:
    """Text, charts with one legend, tables, sample answers; folded parts open on request."""

    identifier: str
    title: str
    text: Sequence[str] = ()
    legend: Legend = ()
    legend_note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded_charts: Sequence[Chart] = ()
    folded_tables: Sequence[tuple[str, Table]] = ()
    folded_text: Sequence[tuple[str, str]] = ()
    samples: Sequence[Sample] = ()


def all_sections(runs: Sequence[RunInputs]) -> list[Section]:
    """The sections that have content, in the order of the page."""
    sections = [
        training_section(runs),
        *curriculum_sections(runs),
        layers_section(runs),
        wins_section(runs),
        answers_section(runs),
        h4_section(runs),
        speed_section(runs),
        record_section(runs),
        configuration_section(runs),
    ]
    return [section for section in sections if section is not None]


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
    return Section(
        "training",
        "Training",
        text,
        legend=[(line.label, line.style) for line in lines],
        legend_note=charts.smoothing_note(lines),
        charts=drawn,
        folded_tables=[("Loss, margin and accuracy of every layer", table)] if table.rows else [],
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


def layers_section(runs: Sequence[RunInputs]) -> Section | None:
    """Layer curves of held-out pairs."""
    models = merge_models(runs, lambda evaluation: evaluation.curves)
    if not models:
        return None
    estimates = {label: curves.estimates for label, curves in models.items()}
    samples = "; ".join(sorted({curves.format_sample for curves in models.values()}))
    return Section(
        "layers",
        "Layers",
        [f"{samples}, read at every layer. Bands are 95 % intervals over prompts."],
        legend=series_legend(models),
        charts=layer_charts(estimates, MAIN_QUANTITIES),
        tables=[tables.final_layers_table(models)],
        folded_charts=layer_charts(estimates, OTHER_QUANTITIES),
        folded_tables=[
            (f"Every layer of {label}", tables.all_layers_table(curves))
            for label, curves in models.items()
        ],
        folded_text=_advice(runs),
    )


def _advice(runs: Sequence[RunInputs]) -> list[tuple[str, str]]:
    """Title and text of each advice; that of an evaluation which runs share once."""
    labels: dict[str, list[str]] = {}
    for run in runs:
        if run.evaluation.advice:
            labels.setdefault(run.evaluation.advice, []).append(run.label)
    title = "Which layers to tap"
    return [
        (title if len(labels) == 1 else f"{title}: {', '.join(names)}", advice)
        for advice, names in labels.items()
    ]


def wins_section(runs: Sequence[RunInputs]) -> Section | None:
    """Win rates."""
    titled = {
        f"{prefix}{comparison.a} against {comparison.b}": (prefix, comparison)
        for _, prefix, comparison in comparisons(runs)
    }
    if not titled:
        return None
    rates = {
        title: (comparison.win_rate, comparison.low, comparison.high)
        for title, (_, comparison) in titled.items()
        if math.isfinite(comparison.win_rate)
    }
    return Section(
        "wins",
        "Win rates",
        [f"{prefix}{judged.summary.removesuffix('.')}." for prefix, judged in titled.values()],
        charts=[win_rate_chart(rates)] if rates else [],
        tables=[tables.wins_table({title: judged for title, (_, judged) in titled.items()})],
    )


def answers_section(runs: Sequence[RunInputs]) -> Section | None:
    """Sample answers, and how they were sampled."""
    samples = select_samples(runs)
    if not samples:
        return None
    number = f"{len(samples)} evenly spaced prompts out of all that were answered"
    settings = [answers.settings.get("sampling") for answers in answer_sets(runs).values()]
    sampling = dict.fromkeys(
        f"Sampled with {format_value(values)}." for values in settings if values
    )
    text = [f"{number}; none was selected by hand.", *sampling]
    return Section("answers", "Answers", text, samples=samples)


def h4_section(runs: Sequence[RunInputs]) -> Section | None:
    """H4 of all models."""
    models = merge_models(runs, lambda evaluation: evaluation.h4)
    if not models:
        return None
    text = ["Percent, ± one standard error."]
    if limits := sorted({result.settings["limit"] or 0 for result in models.values()} - {0}):
        items = " or ".join(f"{limit:,}" for limit in limits)
        text.append(
            f"Only the first {items} items of each task (of MMLU, of each subject): not "
            "comparable to published values."
        )
    sources = ", ".join(dict.fromkeys(result.source for result in models.values()))
    versions = ", ".join(dict.fromkeys(result.settings["lm_eval"] for result in models.values()))
    text.append(f"Items from {sources.replace('hub', 'the hub')}, lm-eval {versions}.")
    return Section("h4", "H4", text, tables=[tables.h4_table(models)])


def speed_section(runs: Sequence[RunInputs]) -> Section | None:
    """Throughput and memory."""
    facts = {run.label: facts for run in runs if (facts := speed_facts(run.records))}
    if not facts:
        return None
    lines = training_lines(runs)
    return Section(
        "speed",
        "Throughput and memory",
        ["Training steps only; means leave out the first steps, which compile."],
        legend=[(line.label, line.style) for line in lines] if len(runs) > 1 else (),
        charts=charts.training_charts(lines, (charts.TOKENS_PER_S, charts.PEAK_GB)),
        tables=[tables.facts_table(facts)],
    )


def record_section(runs: Sequence[RunInputs]) -> Section | None:
    """When and where each run was started, with which command, versions and commit."""
    facts = {run.label: facts for run in runs if (facts := record_facts(run))}
    if not facts:
        return None
    return Section("record", "Record", tables=[tables.facts_table(facts)])


def configuration_section(runs: Sequence[RunInputs]) -> Section | None:
    """Non-default settings of a run, or the differences between runs; complete files."""
    configured = [run for run in runs if run.config]
    if not configured:
        return None
    rows = shown_settings([run.config for run in configured])
    heads = ["Non-default settings", ""]
    if len(configured) > 1:
        heads = ["Differences", *(run.label for run in configured)]
    cells = [(name, list(map(Cell, texts))) for name, texts in rows]
    return Section(
        "configuration",
        "Configuration",
        [] if rows else ["No setting differs."],
        tables=[Table(heads, cells, is_text=True)] if rows else [],
        folded_text=[
            (f"Complete configuration: {run.label}", write_yaml(dict(run.config)))
            for run in configured
        ],
    )


def missing(runs: Sequence[RunInputs]) -> list[tuple[str, str]]:
    """What no run on the page has, and the command that would add it."""
    parts = {
        "Layer likelihoods": ("likelihood", "curves"),
        "Sample answers": ("generate", "answers"),
        "Win rates": ("judge", "comparisons"),
        "H4": ("h4", "h4"),
    }
    is_single_run = len(runs) == 1 and runs[0].config
    config = shlex.quote(str(runs[0].root / RUN_FILE)) if is_single_run else "CONFIG.yaml"
    return [
        (title, f"megatron-idpo {verb} {config}")
        for title, (verb, name) in parts.items()
        if not any(getattr(run.evaluation, name) for run in runs)
    ]

"""The tables of the page: values, each with its interval in small print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.tasks import H4
from megatron_idpo.evaluate.report.inputs import Comparison, RunInputs
from megatron_idpo.figures.evaluation import LAYER_QUANTITIES, MAIN_QUANTITIES
from megatron_idpo.figures.numbers import UNKNOWN, count, decimal, interval, percent
from megatron_idpo.sdpo.manifest import Manifest
from megatron_idpo.sdpo.table import cells
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics import names
from megatron_idpo.train.metrics.file import Record
from megatron_idpo.train.metrics.intervals import wilson_interval


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with a note in small print."""

    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows begin with a name."""

    heads: Sequence[str]
    """Of the columns, the names included."""

    rows: Sequence[tuple[str, Sequence[Cell]]]

    is_text: bool = False
    """Whether cells are text rather than numbers."""


def facts_table(facts: Mapping[str, Mapping[str, Cell]]) -> Table:
    """Facts of runs side by side, under the runs' labels if there are several."""
    titles = dict.fromkeys(title for of_run in facts.values() for title in of_run)
    rows = [
        (title, [of_run.get(title, Cell(UNKNOWN)) for of_run in facts.values()]) for title in titles
    ]
    heads = list(facts) if len(facts) > 1 else [""]
    return Table(["", *heads], rows, is_text=True)


def layers_table(runs: Sequence[RunInputs]) -> Table:
    """Each layer's loss, margin and accuracy at the end of training, on held-out pairs if any."""
    rows = []
    head = "Last logged step"
    for run in runs:
        evaluated = [record for record in run.records if f"{names.EVAL}{names.MARGIN}" in record]
        trained = [record for record in run.records if names.MARGIN in record]
        if not (evaluated or trained):
            continue
        prefix = names.EVAL if evaluated else ""
        head = "Last evaluation, held-out pairs" if evaluated else head
        before = f"{run.label}, " if len(runs) > 1 else ""
        for layer in [*run.layers, None]:
            title = "final layer" if layer is None else f"layer {layer}"
            rows.append((before + title, _layer_cells((evaluated or trained)[-1], prefix, layer)))
    return Table([head, "loss", "margin", "accuracy"], rows)


def _layer_cells(record: Record, prefix: str, layer: int | None) -> list[Cell]:
    metrics = (names.FINAL_LOSS if layer is None else names.LOSS, names.MARGIN, names.ACCURACY)
    loss, margin, share = (
        record.get(prefix + (name if layer is None else names.layer_name(layer, name)), math.nan)
        for name in metrics
    )
    pairs = record.get(names.EVAL_PAIRS, math.nan)
    if is_tied(share, margin):
        accuracy = Cell("tied")
    elif prefix and math.isfinite(share + pairs):
        accuracy = Cell(decimal(share, ".2f"), interval(*wilson_interval(share, pairs)))
    else:
        accuracy = Cell(decimal(share, ".2f"))
    return [Cell(decimal(loss, ".4f")), Cell(decimal(margin, "+.3f")), accuracy]


def final_layers_table(models: Mapping[str, LayerCurves]) -> Table:
    """Each model's layer curves at the final layer."""
    heads = ["At the final layer", *(LAYER_QUANTITIES[name][0] for name in MAIN_QUANTITIES)]
    return Table(
        heads, [(label, _estimates(c, MAIN_QUANTITIES, -1)) for label, c in models.items()]
    )


def all_layers_table(curves: LayerCurves) -> Table:
    """A model's layer curves."""
    rows = [(str(n), _estimates(curves, tuple(LAYER_QUANTITIES), n - 1)) for n in curves.layers]
    return Table(["Layer", *(title for title, _ in LAYER_QUANTITIES.values())], rows)


def _estimates(curves: LayerCurves, quantities: Sequence[str], index: int) -> list[Cell]:
    cells = []
    for name in quantities:
        form = "+.3f" if name == "margin" else ".3f"
        value, low, high = (float(array_L[index]) for array_L in curves.estimates[name])
        cells.append(Cell(decimal(value, form), interval(low, high, form)))
    return cells


def wins_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Win rates and counts."""
    heads = ["Comparison", "win rate", "won", "lost", "tied", "unjudged", "sign test p", "judge"]
    rows = []
    for title, judged in comparisons.items():
        bounds = interval(100 * judged.low, 100 * judged.high, ".0f")
        rate = Cell(percent(judged.win_rate, 1), f"{bounds} %" if bounds else "")
        counts = (judged.wins, judged.losses, judged.ties, judged.unjudged)
        p_value = "< 0.001" if judged.p_value < 0.001 else decimal(judged.p_value)
        others = (*map(count, counts), p_value, judged.judge)
        rows.append((title, [rate, *map(Cell, others)]))
    return Table(heads, rows)


def h4_table(models: Mapping[str, H4Result]) -> Table:
    """Percent and standard errors; tasks that no model has are left out."""
    shown = [name for name in H4_TASKS if any(name in result.tasks for result in models.values())]
    rows = []
    for label, result in models.items():
        tasks = [result.tasks.get(name) for name in shown]
        row = [_percent_cell(t.value, t.stderr) if t else Cell(UNKNOWN) for t in tasks]
        rows.append((label, [*row, _percent_cell(result.mean, result.mean_stderr)]))
    return Table(["Model", *(H4[name].title for name in shown), "H4"], rows)


def _percent_cell(value: float | None, stderr: float | None) -> Cell:
    note = "" if stderr is None else f"± {100 * stderr:.2f}"
    return Cell(UNKNOWN if value is None else f"{100 * value:.2f}", note)


def curriculum_table(manifest: Manifest) -> Table:
    """sDPO steps: their pairs, and what each step's result achieves."""
    heads = ["Step", "state", "pairs", "accuracy", "margin", "accuracy vs first", "margin vs first"]
    rows = [(name, [Cell(text) for text in texts]) for name, *texts in cells(manifest)]
    return Table(heads, [(name, row[: len(heads) - 1]) for name, row in rows])


def sources_table(manifest: Manifest) -> Table:
    """Pairs of each source in each step, and the first model's accuracy on it."""
    heads = ["Source", "first model's accuracy"]
    heads += [f"step {index}" for index in range(1, len(manifest.steps) + 1)]
    rows = []
    for source, share in manifest.accuracy.items():
        counts = [count(step.sources.get(source, 0)) for step in manifest.steps]
        rows.append((source, list(map(Cell, [percent(share, 1), *counts]))))
    return Table(heads, rows)

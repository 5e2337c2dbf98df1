"""The page's tables: figures in rows and columns, each with its interval in small print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_idpo.evaluate.lm_eval.tasks import H4
from megatron_idpo.evaluate.report.charts_evaluation import LEADING, SHOWN, Curve
from megatron_idpo.evaluate.report.evaluation_inputs import Duel, Tasks
from megatron_idpo.evaluate.report.format import (
    NOTHING,
    accuracy,
    count,
    decimal,
    interval,
    percent,
)
from megatron_idpo.evaluate.report.headline_speed import Fact
from megatron_idpo.evaluate.report.input_files import number
from megatron_idpo.evaluate.report.inputs import Found
from megatron_idpo.sdpo.table import cells
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.file import Record
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    EVAL_PAIRS,
    FINAL_LOSS,
    LOSS,
    MARGIN,
    layer_name,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure, and what belongs to it."""

    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows have a name in front."""

    heads: Sequence[str]
    """Of the columns; the first one's is of the names."""

    rows: Sequence[tuple[str, Sequence[Cell]]]

    is_text: bool = False
    """Whether cells are words rather than figures."""


def facts_table(facts: Mapping[str, Sequence[Fact]], head: str = "") -> Table:
    """Facts of several runs beside each other."""
    names = list(dict.fromkeys(fact.name for of_run in facts.values() for fact in of_run))
    by_run = [{fact.name: Cell(fact.value, fact.note) for fact in one} for one in facts.values()]
    rows = [(name, [one.get(name, Cell(NOTHING)) for one in by_run]) for name in names]
    return Table([head, *facts], rows, is_text=True)


def layers_table(runs: Sequence[Found]) -> Table | None:
    """Every layer's figures at the end of training, on held-out pairs where there are some."""
    rows = []
    held_out = False
    for run in runs:
        record = next((one for one in reversed(run.records) if f"{EVAL}{MARGIN}" in one), None)
        prefix = EVAL if record else ""
        held_out |= bool(record)
        record = record or next((one for one in reversed(run.records) if MARGIN in one), None)
        if record is None:
            continue
        before = f"{run.label}, " if len(runs) > 1 else ""
        for layer in [*run.layers, None]:
            name = "final layer" if layer is None else f"layer {layer}"
            rows.append((before + name, _layer_cells(record, prefix, layer)))
    if not rows:
        return None
    head = "Last evaluation, held-out pairs" if held_out else "Last logged step"
    return Table([head, "loss", "margin", "accuracy"], rows)


def _layer_cells(record: Record, prefix: str, layer: int | None) -> list[Cell]:
    def value(name: str) -> float:
        whole = name if layer is None else layer_name(layer, name)
        return record.get(f"{prefix}{whole}", math.nan)

    share, margin = value(ACCURACY), value(MARGIN)
    pairs = record.get(EVAL_PAIRS, math.nan)
    note = ""
    if prefix and math.isfinite(share + pairs) and not is_tied(share, margin):
        note = interval(*wilson_interval(share, pairs))
    loss = value(FINAL_LOSS if layer is None else LOSS)
    return [
        Cell(decimal(loss, ".4f")),
        Cell(decimal(margin, "+.3f")),
        Cell(accuracy(share, margin), note),
    ]


def final_layers_table(lines: Sequence[Curve]) -> Table:
    """Each model's layer curves at the final layer."""
    rows = [
        (line.label, [_estimate(line, name, len(line.curves.layers) - 1) for name in LEADING])
        for line in lines
    ]
    return Table(["At the final layer", *(SHOWN[name][0] for name in LEADING)], rows)


def all_layers_table(line: Curve) -> Table:
    """A model's layer curves in figures."""
    rows = [
        (str(layer), [_estimate(line, name, location) for name in SHOWN])
        for location, layer in enumerate(line.curves.layers)
    ]
    return Table(["Layer", *(title for title, _ in SHOWN.values())], rows)


def _estimate(line: Curve, name: str, location: int) -> Cell:
    one = line.curves.estimates[name]
    form = "+.3f" if name == "margin" else ".3f"
    value, low, high = (float(array[location]) for array in (one.value_L, one.low_L, one.high_L))
    return Cell(decimal(value, form), interval(low, high, form))


def duels_table(duels: Sequence[tuple[str, Duel]]) -> Table:
    """Win rates in figures."""
    heads = ["Comparison", "win rate", "won", "lost", "tied", "unjudged", "sign test p", "judge"]
    rows = []
    for title, duel in duels:
        bounds = interval(100 * duel.low, 100 * duel.high, ".0f")
        counts = [Cell(count(n)) for n in (duel.wins, duel.losses, duel.ties, duel.unjudged)]
        rate = Cell(percent(duel.rate, 1), f"{bounds} %" if bounds else "")
        rows.append((title, [rate, *counts, Cell(_format_p(duel.p_value)), Cell(duel.judge)]))
    return Table(heads, rows)


def _format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else decimal(p_value)


def h4_table(models: Mapping[str, Tasks]) -> Table:
    """Percent and standard errors, tasks in the papers' order."""
    present = dict.fromkeys(name for one in models.values() for name in one.tasks)
    names = [name for name in H4 if name in present] + [n for n in present if n not in H4]
    heads = ["Model", *(H4[name].title if name in H4 else name for name in names), "H4"]
    rows = [
        (
            model,
            [
                *(_task(one.tasks.get(name, {})) for name in names),
                _percent_cell(one.mean, one.mean_stderr),
            ],
        )
        for model, one in models.items()
    ]
    return Table(heads, rows)


def _task(values: Mapping[str, Any]) -> Cell:
    return _percent_cell(*(number(values, name) for name in ("value", "stderr")))


def _percent_cell(value: float, error: float) -> Cell:
    note = f"± {decimal(100 * error, '.2f')}" if math.isfinite(error) else ""
    return Cell(decimal(100 * value, ".2f"), note)


def curriculum_table(run: Found) -> Table:
    """Steps of sDPO: what each learnt from and what its result is worth."""
    assert run.manifest is not None, run.root
    heads = ["Step", "state", "pairs", "accuracy", "margin", "accuracy vs first", "margin vs first"]
    rows = [(row[0], [_split(text) for text in row[1 : len(heads)]]) for row in cells(run.manifest)]
    return Table(heads, rows)


def _split(message: str) -> Cell:
    """`0.78 [0.62, 0.88]` as a figure and its interval."""
    value, bracket, bounds = message.replace("-", "\N{MINUS SIGN}").partition(" [")
    return Cell(value, bounds.rstrip("]").replace(", ", " to ") if bracket else "")


def sources_table(run: Found) -> Table:
    """Which source's pairs each step learnt from, and what the first model made of them."""
    assert run.manifest is not None, run.root
    steps = run.manifest.steps
    heads = ["Source", "first model's accuracy", *(f"step {n}" for n in range(1, len(steps) + 1))]
    rows = [
        (
            source,
            [
                Cell(percent(share, 1)),
                *(Cell(count(step.sources.get(source, 0))) for step in steps),
            ],
        )
        for source, share in run.manifest.accuracy.items()
    ]
    return Table(heads, rows)

"""Measured values next to those that the sDPO paper prints, each marked with its origin."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.tasks import H4, SAME_FILE
from megatron_idpo.evaluate.paper_figures import PAPER_H4, SDPO_PAPER
from megatron_idpo.sdpo import table as tables

MISSING = "–"
HEADS = ("model", "from", "H4", *(H4[name].title for name in H4_TASKS))


def markdown(results: Sequence[H4Result]) -> str:
    """`h4.md`."""
    table = tables.markdown(HEADS, _rows(results, decimals=2, with_items=True))
    return "\n".join(["# H4", "", table, *(f"- {note}" for note in notes(results)), ""])


def terminal_table(results: Sequence[H4Result]) -> Table:
    """The table for 80 columns, without the numbers of items."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column, head in enumerate(HEADS):
        table.add_column(head, justify="left" if column < 2 else "right", no_wrap=column > 0)
    for row in _rows(results, decimals=1, with_items=False):
        table.add_row(*map(Text, row))
    return table


def notes(results: Sequence[H4Result]) -> list[str]:
    """How values were measured, and what limits their comparison."""
    metrics = ", ".join(f"{task.title} {task.shown} {task.few_shot}-shot" for task in H4.values())
    versions = ", ".join(sorted({result.settings["lm_eval"] for result in results}))
    lines = [f"measured: percent ± standard error, by lm-eval {versions}. {metrics}."]
    same_file = [
        task.title
        for name, task in H4.items()
        if any(r.tasks[name].examples == SAME_FILE for r in results if name in r.tasks)
    ]
    if any(result.settings["limit"] is not None for result in results):
        lines.append("Only the first items of each task were asked (h4.limit).")
    lines.append(
        f"paper: {SDPO_PAPER}; all items, no intervals. Values of another model, or of a part of "
        "the items, neither confirm nor refute them."
    )
    if same_file:
        lines.append(
            f"{', '.join(same_file)}: examples are other items of the same file; the task's own "
            "are from its training split."
        )
    lines += [
        f"{result.model}, {H4[name].title}: {task.cut:,} prompts were longer than the model's "
        "context and lost their first examples."
        for result in results
        for name, task in result.tasks.items()
        if task.cut
    ]
    if any(result.mean is None for result in results):
        lines.append("H4 is the mean of all four tasks, and left out where one is missing.")
    return lines


def _rows(results: Sequence[H4Result], *, decimals: int, with_items: bool) -> list[tuple[str, ...]]:
    """Our models, then the paper's."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        cells = [_percent(result.mean, result.mean_stderr, decimals)]
        for task in map(result.tasks.get, H4_TASKS):
            text = _percent(task.value, task.stderr, decimals) if task else MISSING
            cells.append(f"{text} ({task.items:,})" if task and with_items else text)
        rows.append((result.model, "measured", *cells))
    for paper in PAPER_H4:
        rows.append((paper.model, "paper", *(f"{v:.2f}" for v in (paper.mean, *paper.values))))
    return rows


def _percent(value: float | None, stderr: float | None, decimals: int) -> str:
    if value is None:
        return MISSING
    text = f"{100 * value:.{decimals}f}"
    return text if stderr is None else f"{text} ± {100 * stderr:.{decimals}f}"

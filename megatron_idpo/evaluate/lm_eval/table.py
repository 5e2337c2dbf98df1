"""Measured values next to those that the sDPO paper prints, each marked with its origin."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.tasks import H4, SAME_FILE
from megatron_idpo.evaluate.paper_figures import PAPER_H4, SDPO_PAPER

MISSING = "–"
HEADS = ("model", "from", "H4", *(H4[name].title for name in H4_TASKS))


def markdown(results: Sequence[H4Result]) -> str:
    """`h4.md`."""
    alignment = ("---", "---", *["---:"] * (len(HEADS) - 2))
    lines = [HEADS, alignment, *_rows(results, decimals=2, with_items=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(["# H4", "", table, "", *(f"- {note}" for note in notes(results)), ""])


def terminal_table(results: Sequence[H4Result]) -> Table:
    """The table for 80 columns; the numbers of items are in the notes."""
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
    counts, same_file = [], []
    for name, task in H4.items():
        measured = [result.tasks[name] for result in results if name in result.tasks]
        if measured:
            sizes = sorted({result.items for result in measured})
            counts.append(f"{task.title} {' or '.join(f'{size:,}' for size in sizes)}")
        if any(result.examples == SAME_FILE for result in measured):
            same_file.append(task.title)
    is_limited = any(result.settings["limit"] is not None for result in results)
    limit = ", the first ones only (h4.limit)" if is_limited else ""
    lines.append(f"items: {', '.join(counts)}{limit}.")
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
        for name in H4_TASKS:
            task = result.tasks.get(name)
            text = _percent(task.value, task.stderr, decimals) if task else MISSING
            cells.append(f"{text} ({task.items:,})" if task and with_items else text)
        rows.append((result.model, "measured", *cells))
    for paper in PAPER_H4:
        values = (paper.mean, *paper.values)
        rows.append((paper.model, "paper", *(f"{value:.2f}" for value in values)))
    return rows


def _percent(value: float | None, stderr: float | None, decimals: int) -> str:
    if value is None:
        return MISSING
    text = f"{100 * value:.{decimals}f}"
    return text if stderr is None else f"{text} ± {100 * stderr:.{decimals}f}"

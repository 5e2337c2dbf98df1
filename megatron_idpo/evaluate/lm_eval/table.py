"""Measured figures beside those that the sDPO paper prints, each marked as what it is."""

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.tasks import H4, SAME_FILE
from megatron_idpo.evaluate.paper_figures import PAPER_H4, SDPO_PAPER

NOTHING = "–"
HEADS = ("model", "from", "H4", *(H4[name].title for name in H4_TASKS))


def markdown(results: Sequence[H4Result]) -> str:
    """`h4.md`."""
    rows = [*_measured(results, decimals=2, with_items=True), *_paper()]
    lines = [HEADS, ("---", "---", *["---:"] * (len(HEADS) - 2)), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(["# H4", "", table, "", *(f"- {note}" for note in notes(results)), ""])


def terminal_table(results: Sequence[H4Result]) -> Table:
    """The same for 80 characters; how many items there were, is in the notes."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in HEADS:
        justify: Literal["left", "right"] = "left" if head in HEADS[:2] else "right"
        table.add_column(head, justify=justify, no_wrap=head != HEADS[0])
    for row in [*_measured(results, decimals=1, with_items=False), *_paper()]:
        table.add_row(*map(Text, row))
    return table


def notes(results: Sequence[H4Result]) -> list[str]:
    """How the figures were got, and what keeps them from being compared."""
    versions = sorted({result.settings["lm_eval"] for result in results})
    how = ", ".join(
        f"{H4[name].title} {H4[name].shown} with {H4[name].few_shot} examples" for name in H4_TASKS
    )
    return [
        f"measured: percent ± standard error, by lm-eval {', '.join(versions)}. {how}.",
        *_format_items(results),
        f"paper: {SDPO_PAPER}; all items, no intervals. A figure of another model, or of a part of "
        "the items, neither confirms nor refutes them.",
        *_format_same_file(results),
        *_format_cut(results),
        *_format_mean(results),
    ]


def _measured(
    results: Sequence[H4Result], *, decimals: int, with_items: bool
) -> list[tuple[str, ...]]:
    """A row for each of our models."""
    found = []
    for result in results:
        cells = [_percent(result.mean, result.mean_stderr, decimals)]
        for name in H4_TASKS:
            task = result.tasks.get(name)
            if task is None:
                cells.append(NOTHING)
                continue
            message = _percent(task.value, task.stderr, decimals)
            cells.append(f"{message} ({task.items:,})" if with_items else message)
        found.append((result.model, "measured", *cells))
    return found


def _paper() -> list[tuple[str, ...]]:
    return [
        (row.model, "paper", f"{row.mean:.2f}", *(f"{value:.2f}" for value in row.values))
        for row in PAPER_H4
    ]


def _format_items(results: Sequence[H4Result]) -> list[str]:
    found = []
    for name in H4_TASKS:
        counts = {result.tasks[name].items for result in results if name in result.tasks}
        if counts:
            found.append(f"{H4[name].title} {' or '.join(f'{n:,}' for n in sorted(counts))}")
    limits = {result.settings["limit"] for result in results}
    limited = "" if limits == {None} else ", the first ones only (h4.limit)"
    return [f"items: {', '.join(found)}{limited}."]


def _format_same_file(results: Sequence[H4Result]) -> list[str]:
    names = [
        H4[name].title
        for name in H4_TASKS
        if any(
            name in result.tasks and result.tasks[name].examples == SAME_FILE for result in results
        )
    ]
    if not names:
        return []
    message = f"{', '.join(names)}: examples are other items of the same file"
    return [f"{message}; the task's own are from its training split."]


def _format_cut(results: Sequence[H4Result]) -> list[str]:
    return [
        f"{result.model}, {H4[name].title}: {task.cut:,} prompts were longer than the model's "
        "context and lost their beginning."
        for result in results
        for name, task in result.tasks.items()
        if task.cut
    ]


def _format_mean(results: Sequence[H4Result]) -> list[str]:
    if all(result.mean is not None for result in results):
        return []
    return ["H4 is the mean of all four, and is left open where one is missing."]


def _percent(value: float | None, stderr: float | None, decimals: int) -> str:
    if value is None:
        return NOTHING
    message = f"{100 * value:.{decimals}f}"
    return message if stderr is None else f"{message} ± {100 * stderr:.{decimals}f}"

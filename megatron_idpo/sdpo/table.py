"""Table of the steps of an sDPO run: training pairs, held-out metrics and snapshots.

It is built from the manifest alone, so that it can be shown during and after the run.
"""

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_idpo.sdpo.manifest import FIRST, Manifest, StepRecord
from megatron_idpo.train.logging.line import format_accuracy
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, MARGIN

UNKNOWN = "–"
_RESULTS = ("accuracy", "margin", "accuracy vs first", "margin vs first")
_TERMINAL_HEADS = ("step", "state", "pairs", *_RESULTS)
"""Columns that fit into 80 characters; `status` prints snapshots in separate lines."""

HEADS = (*_TERMINAL_HEADS, "snapshot", "size")


def cells(manifest: Manifest) -> list[tuple[str, ...]]:
    """One row of `HEADS` per step. Accuracies are of held-out pairs, with 95 % intervals."""
    return [
        (
            str(number),
            step.state,
            f"{step.pairs:,}",
            *_figures(step, ""),
            *_figures(step, FIRST),
            short_identity(step.snapshot) + (" (removed)" if step.is_removed else ""),
            format_size(step.snapshot_bytes) if step.snapshot else UNKNOWN,
        )
        for number, step in enumerate(manifest.steps, start=1)
    ]


def terminal_table(manifest: Manifest) -> Table:
    """The table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for head in _TERMINAL_HEADS:
        justify: Literal["left", "right"] = "left" if head == "state" else "right"
        table.add_column(head.replace(" vs ", "\nvs "), justify=justify)
    for row in cells(manifest):
        table.add_row(*map(Text, row[: len(_TERMINAL_HEADS)]))
    return table


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars within cells are escaped."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def short_identity(identity: str | None) -> str:
    """The first 12 digits of a hash."""
    return UNKNOWN if identity is None else identity[:12]


def format_size(size_bytes: int) -> str:
    """`538.0 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def _figures(step: StepRecord, against: str) -> tuple[str, str]:
    """Accuracy and margin; `against` is the prefix of the reference in the metrics."""
    prefix = f"{against}{EVAL}"
    accuracy, margin = (step.metrics.get(f"{prefix}{name}") for name in (ACCURACY, MARGIN))
    if accuracy is None or margin is None:
        return UNKNOWN, UNKNOWN
    pairs = step.metrics.get(f"{against}{EVAL_PAIRS}")
    return format_accuracy(accuracy, margin, pairs), f"{margin:+.3f}"

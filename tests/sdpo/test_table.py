"""The table of the steps: values, missing values, and its width."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.sdpo.table import (
    HEADS,
    UNKNOWN,
    cells,
    format_size,
    markdown,
    short_identity,
    terminal_table,
)

from .tiny_manifest import identity, manifest, metrics, record

WIDTH = 80


def shown(now: Manifest) -> list[str]:
    """Lines of the table in a terminal of 80 columns."""
    written = io.StringIO()
    Console(file=written, width=WIDTH, highlight=False).print(terminal_table(now))
    return [line.rstrip() for line in written.getvalue().splitlines() if line.strip(" ─")]


def test_row_of_every_step() -> None:
    first, second, third = cells(manifest("complete", "training", "pending"))
    assert dict(zip(HEADS, first, strict=True)) == {
        "step": "1",
        "state": "complete",
        "pairs": "1,000",
        "accuracy": "0.75 [0.60, 0.86]",
        "margin": "+0.125",
        "accuracy vs first": "0.75 [0.60, 0.86]",
        "margin vs first": "+0.250",
        "snapshot": identity("snapshot1")[:12],
        "size": "269.0 MB",
    }
    assert second == ("2", "training", "2,000", *[UNKNOWN] * 6)
    assert third == ("3", "pending", "3,000", *[UNKNOWN] * 6)


def test_removed_snapshot() -> None:
    now = manifest("complete").with_step(1, is_removed=True)
    assert cells(now)[0][-2:] == (f"{identity('snapshot1')[:12]} (removed)", "269.0 MB")


def test_missing_metrics() -> None:
    values = metrics(0.75, 0.5)
    own = {name: value for name, value in values.items() if not name.startswith(FIRST)}
    steps = (
        record(1, "complete", metrics={}),
        record(2, "complete", metrics=own),
        record(3, "complete", metrics={**values, "eval_rewards/margins": 1e-3}),
        record(4, "complete", metrics=metrics(0.0, 0.0)),
    )
    figures = [row[3:7] for row in cells(manifest(steps=steps))]
    assert figures == [
        (UNKNOWN,) * 4,
        ("0.75 [0.60, 0.86]", "+0.500", UNKNOWN, UNKNOWN),
        ("0.75 [0.60, 0.86]", "+0.001", "0.75 [0.60, 0.86]", "+1.000"),
        ("tied", "+0.000", "tied", "+0.000"),
    ]


def test_table_fits_a_terminal() -> None:
    """No cell is wrapped or truncated; heads may take two lines."""
    large = record(1, "complete", pairs=1_234_567, metrics=metrics(1.0, -12.3456, 1000))
    now = manifest(steps=tuple(replace(large, pairs=number * large.pairs) for number in range(12)))
    lines = shown(now)
    assert max(map(len, lines)) <= WIDTH
    rows = cells(now)
    assert len(lines) <= len(rows) + 2
    for row, line in zip(rows, lines[-len(rows) :], strict=True):
        cells_text = "".join(row[:7]).replace(" ", "")
        assert line.replace(" ", "") == cells_text
    heads = " ".join(lines[: -len(rows)]).split()
    assert all(word in heads for head in HEADS[:7] for word in head.split())


def test_brackets_are_not_markup() -> None:
    assert "0.75 [0.60, 0.86]" in shown(manifest("complete"))[-1]


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == (
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n"
    )
    assert markdown(["a"], []) == "| a |\n| --- |\n"
    assert markdown(["a|b"], [["1|2"]]) == "| a\\|b |\n| --- |\n| 1\\|2 |\n"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (538_000_000, "538.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (1_400_000_000_000, "1400.0 GB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_short_identities() -> None:
    assert short_identity(None) == UNKNOWN
    assert short_identity("0123456789abcdef") == "0123456789ab"

"""The data report: sums, JSON, and its lines."""

import json
from dataclasses import asdict

from megatron_idpo.data.report import DataReport, Note


def test_reports_add_up_and_round_trip_through_json() -> None:
    total = DataReport(rows=3, kept_pairs=2, dropped_pairs={"long": 1}, prompt_tokens=20)
    total.add(DataReport(rows=4, kept_pairs=2, dropped_pairs={"long": 1, "same": 1}))
    assert (total.rows, total.kept_pairs, total.prompt_tokens) == (7, 4, 20)
    assert total.dropped_pairs == {"long": 2, "same": 1}
    assert DataReport(**json.loads(json.dumps(asdict(total)))) == total


def test_lines_leave_out_counts_of_zero() -> None:
    lines = DataReport(rows=2, kept_pairs=1, dropped_pairs={"too long": 1}, chosen_tokens=3).lines()
    assert lines == [
        "1 pairs kept of 2 rows",
        "1 dropped: too long",
        "mean tokens: prompt 0, chosen 3, rejected 0",
    ]
    everything = DataReport(
        rows=9,
        truncated_pairs=1,
        skipped_rows=2,
        notes={"left out": Note(count=3, part=0, row=1, detail="x")},
    ).lines()
    assert [line.split()[0] for line in everything] == ["0", "1", "2", "3"]


def test_note_counts_pairs_and_names_the_first() -> None:
    """A cached report has no file names; each source adds its own."""
    cached = DataReport(rows=3, kept_pairs=3)
    cached.note("prefill", 1, 7, "a" * 200)
    cached.note("prefill", 0, 8, "b")
    cached.note("unread: context", 0, 9, "'context' is 'c'")
    cached = DataReport(**json.loads(json.dumps(asdict(cached))))
    total = DataReport()
    for name in ("first", "second"):
        total.add(cached, lambda part, row, name=name: f"{name}{part}:{row}")
    unread, prefill = total.warnings()
    assert unread.startswith("2 pairs: a field is not read")
    assert unread.endswith("; first: first0:9: 'context' is 'c'")
    assert prefill.startswith("4 pairs: the prompt ends with the assistant")
    assert prefill.endswith("; first: first1:7: " + "a" * 100)
    assert cached.notes["prefill"].count == 2, "unchanged"

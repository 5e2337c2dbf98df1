"""The data report: sums, JSON, and its lines."""

import json
from dataclasses import asdict

from megatron_idpo.data.report import DataReport


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
        moved_boundaries=3,
        unterminated_pairs=4,
        untemplated_pairs=5,
        longer_answers=6,
    ).lines()
    assert [line.split()[0] for line in everything] == ["0", "1", "2", "3", "6", "4", "5"]

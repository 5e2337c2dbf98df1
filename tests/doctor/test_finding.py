"""A report's view of its findings."""

import pytest

from megatron_idpo.doctor.finding import Finding, Report, State

REPORT = Report(
    (
        ("First", tuple(Finding(state, state, "x") for state in (State.OK, State.BROKEN))),
        ("Second", (Finding("also broken", State.BROKEN, "y"), Finding("n", State.NOTE, "z"))),
    )
)


def test_findings_are_those_of_all_groups_in_order():
    assert [finding.name for finding in REPORT.findings] == ["ok", "broken", "also broken", "n"]
    assert REPORT["n"].found == "z"


def test_only_what_is_broken_prevents_a_run():
    assert [finding.name for finding in REPORT.broken] == ["broken", "also broken"]
    rest = (State.OK, State.NOTE, State.MISSING)
    assert not Report((("", tuple(Finding(state, state, "") for state in rest)),)).broken


@pytest.mark.parametrize("field", ["meaning", "remedy"])
def test_a_finding_need_not_mean_or_ask_anything(field):
    assert getattr(Finding("a", State.OK, "1.0"), field) == ""

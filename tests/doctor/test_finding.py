"""A report and its findings."""

from megatron_idpo.doctor.finding import Finding, Report, State

REPORT = Report(
    (
        ("First", tuple(Finding(state, state, "x") for state in (State.OK, State.BROKEN))),
        ("Second", (Finding("also broken", State.BROKEN, "y"), Finding("n", State.NOTE, "z"))),
    )
)


def test_findings_of_all_groups_are_in_order():
    assert [finding.name for finding in REPORT.findings] == ["ok", "broken", "also broken", "n"]
    assert REPORT["n"].value == "z"


def test_names_of_a_state():
    assert REPORT.names(State.BROKEN) == ["broken", "also broken"]
    assert REPORT.names(State.MISSING) == []

"""Output and exit code of the verb `doctor`."""

import io

import pytest
from rich.console import Console

from megatron_idpo.doctor import main as doctor
from megatron_idpo.doctor.finding import Finding, Report, State


def printed(report: Report) -> str:
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=100))
    return out.getvalue()


def test_a_finding_is_printed_with_consequence_and_remedy():
    findings = (
        Finding("a", State.OK, "1.0"),
        Finding("b", State.MISSING, "gone", "costs [much]", "get it"),
    )
    text = printed(Report((("Things", findings),)))
    for word in ("Things", "1.0", "gone", "costs [much]", "→ get it", "can run here"):
        assert word in text
    broken = Finding("c", State.BROKEN, "bad", "", "repair it")
    assert "Cannot run yet. Fix: c." in printed(Report((("Things", (*findings, broken)),)))


def test_unchecked_findings_are_named_in_the_summary():
    findings = (
        Finding("model", State.UNCHECKED, "some/model"),
        Finding("data", State.UNCHECKED, "x"),
    )
    text = printed(Report((("Configuration", findings),)))
    assert "Valid. Not checked: model, data (not on this machine)." in text
    planned = Finding("plan", State.NOTE, "70.6 B parameters, 600 GB per GPU", "does not fit")
    text = " ".join(printed(Report((("Configuration", (*findings, planned)),))).split())
    assert text.endswith("machine). 70.6 B parameters, 600 GB per GPU, does not fit.")


@pytest.mark.parametrize(("state", "code"), [(State.OK, 0), (State.MISSING, 0), (State.BROKEN, 2)])
def test_exit_code(monkeypatch, capsys, state, code):
    report = Report((("Things", (Finding("a", state, "x"),)),))
    monkeypatch.setattr(doctor, "examine", lambda *_: report)
    assert doctor.main() == code and doctor.main("c.yaml", ["a.b=1"]) == code
    assert capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert doctor.main() == code and not capsys.readouterr().out

"""What the doctor prints and returns, also where importing megatron-core crashes."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_idpo.doctor import main as doctor
from megatron_idpo.doctor.finding import Finding, Report, State


def test_it_works_where_importing_megatron_core_crashes(tmp_path, fake_module):
    crash = "raise FileNotFoundError('Could not find shared object file')"
    fake_module(tmp_path, "transformer_engine", crash, "2.20.2")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "megatron_idpo.doctor.main"]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert child.returncode == 2, child.stderr
    assert "2.20.2, half installed: FileNotFoundError" in child.stdout
    assert "importing it fails: FileNotFoundError" in child.stdout
    assert "mend: megatron-core, Transformer Engine." in child.stdout


def printed(report: Report) -> str:
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=100))
    return out.getvalue()


def test_every_finding_is_printed_with_meaning_and_remedy():
    findings = (
        Finding("a", State.OK, "1.0"),
        Finding("b", State.MISSING, "gone", "costs [much]", "get it"),
    )
    text = printed(Report((("Things", findings),)))
    for word in ("Things", "1.0", "gone", "costs [much]", "→ get it", "can run here"):
        assert word in text
    broken = Finding("c", State.BROKEN, "bad", "", "mend it")
    assert "cannot run here; mend: c." in printed(Report((("Things", (*findings, broken)),)))


@pytest.mark.parametrize(("state", "code"), [(State.OK, 0), (State.MISSING, 0), (State.BROKEN, 2)])
def test_the_exit_code_says_whether_it_can_run(monkeypatch, capsys, state, code):
    report = Report((("Things", (Finding("a", state, "x"),)),))
    monkeypatch.setattr(doctor, "examine", lambda *_: report)
    assert doctor.main() == code and doctor.run(["c.yaml", "a.b=1"]) == code
    assert capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert doctor.main() == code and not capsys.readouterr().out

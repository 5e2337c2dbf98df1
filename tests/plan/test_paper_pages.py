"""The GPU-hours on the papers' pages are what `megatron-idpo plan` estimates."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| (\d+):(\d\d) \| ([\d.]+) \| `megatron-idpo (plan [^`]+)` \|")
ROUNDING_MINUTES = 1
ROUNDING_GPU_HOURS = 0.05

ROWS = [
    (page.name, *row)
    for page in sorted((ROOT / "docs/papers").glob("*.md"))
    for row in ROW.findall(page.read_text())
]


@pytest.mark.parametrize(("page", "hours", "minutes", "gpu_hours", "command"), ROWS)
def test_gpu_hours_are_those_of_the_plan(
    page: str,
    hours: str,
    minutes: str,
    gpu_hours: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert cli.main([*words, "--json"]) == 0
    planned_hours = json.loads(capsys.readouterr().out)["days"] * 24
    gpus = int(words[words.index("--gpus") + 1])
    assert abs(planned_hours * 60 - int(hours) * 60 - int(minutes)) <= ROUNDING_MINUTES
    assert planned_hours * gpus == pytest.approx(float(gpu_hours), abs=ROUNDING_GPU_HOURS)


def test_every_page_has_estimates() -> None:
    assert {page for page, *_ in ROWS} == {"intermediate_dpo.md", "sdpo.md"}

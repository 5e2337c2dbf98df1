"""Table and files of layer curves."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_idpo.evaluate.likelihood.summary import likelihood_table, show_curves

from .test_layer_curves import curves


@pytest.mark.parametrize("pairs", [1, 60])
def test_table_fits_80_columns(pairs: int) -> None:
    random = np.random.default_rng(0)
    reference_PL2 = random.normal(-60, 15, (pairs, 30, 2))
    policy_PL2 = reference_PL2 + random.normal(0, 40, reference_PL2.shape)
    console = Console(width=80, record=True, file=StringIO())
    console.print(likelihood_table([curves(policy_PL2, reference_PL2)]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    rows = [line for line in lines if "/30" in line]
    assert [row.split("/30")[0].split()[-1] for row in rows] == ["8", "15", "21", "30"]
    assert rows[0].startswith("made up"), "the name is not wrapped"
    assert all(row.count("[") == (3 if pairs > 1 else 0) for row in rows), rows
    assert "nan" not in "".join(lines)


def test_figures_and_advice_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logps_PL2 = np.random.default_rng(1).normal(-60, 15, (20, 4, 2))
    show_curves([curves(logps_PL2 + 1, logps_PL2)], tmp_path)
    message = capsys.readouterr().out
    for name in ("likelihood.png", "likelihood.svg", "advice.md"):
        assert (tmp_path / name).stat().st_size > 500, name
    assert not list(tmp_path.glob(".*")), "temporary files are deleted"
    assert "20 held-out pairs of 20 prompts; 95% intervals over prompts" in message

"""`examples/notebook.ipynb`: executed, and every cell works."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_notebook import code_cells

import megatron_idpo

from ..train.tiny_run import write_files

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_every_cell_was_executed_and_uses_public_names() -> None:
    cells = list(code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8"))))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in shown} == {"stream", "execute_result"}
    for cell in cells:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            match node:
                case ast.Attribute(ast.Name("megatron_idpo"), name):
                    assert name in megatron_idpo.__all__


@pytest.mark.exhaustive  # a minute; tests/test_api.py calls the same functions
def test_the_notebook_runs(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    command = [sys.executable, str(ROOT / "tools" / "run_notebook.py"), str(NOTEBOOK)]
    environment = {**os.environ, "MODEL": str(files.model), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "executed.ipynb")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

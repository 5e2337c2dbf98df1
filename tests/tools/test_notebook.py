"""`examples/notebook.ipynb`: executed, and every cell works."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_idpo

from ..train.tiny_run import write_files

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_every_cell_was_executed_and_uses_public_names() -> None:
    cells = code_cells()
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
    """Its cells as one script, in an empty directory."""
    files = write_files(tmp_path / "files")
    (tmp_path / "empty").mkdir()
    script = tmp_path / "cells"
    script.write_text("\n".join("".join(cell["source"]) for cell in code_cells()))
    environment = {**os.environ, "MODEL": str(files.model), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

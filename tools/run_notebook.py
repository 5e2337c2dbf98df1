"""Executes a notebook's code cells in one process and keeps their output in the file.

    python tools/run_notebook.py examples/notebook.ipynb [--output FILE]

Without Jupyter: cells are plain Python, and what a cell prints or its last expression is its
output. The directory for results is temporary, and its name is replaced in the output.
"""

import argparse
import ast
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any


def main() -> int:
    """Execute the notebook; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, help="default: the notebook itself")
    options = parser.parse_args()
    notebook = json.loads(options.notebook.read_text(encoding="utf-8"))
    output = (options.output or options.notebook).absolute()
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        execute(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    output.write_text(f"{text}\n", encoding="utf-8")
    return 0


def execute(notebook: dict[str, Any]) -> None:
    """Run every code cell in the current directory, and store its output."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        cell["execution_count"] = count
        cell["outputs"] = list(_outputs("".join(cell["source"]), namespace, count))


def code_cells(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells that have code."""
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def _outputs(source: str, namespace: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    tree = ast.parse(source)
    last, value = tree.body[-1] if tree.body else None, None
    if isinstance(last, ast.Expr):  # a cell shows the value of its last line
        tree.body.pop()
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    if text := _without_paths(printed.getvalue()):
        yield {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
    if value is not None:
        lines = _without_paths(repr(value)).splitlines(keepends=True)
        data = {"text/plain": lines}
        yield {
            "output_type": "execute_result",
            "execution_count": count,
            "metadata": {},
            "data": data,
        }


def _without_paths(text: str) -> str:
    """Text without the names of this machine's directories."""
    for path, name in ((os.getcwd(), "."), (os.environ.get("MODEL", ""), "MODEL")):
        text = text.replace(path, name) if path else text
    return text


if __name__ == "__main__":
    sys.exit(main())

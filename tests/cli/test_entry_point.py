"""The console script that the package declares exists."""

import importlib
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_console_script_names_a_callable() -> None:
    scripts = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]
    module, _, function = scripts["megatron-idpo"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))

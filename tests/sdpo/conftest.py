"""Input files and finished runs that tests share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..train.tiny_run import Files, Outcome, write_files
from .stepped_run import EXPORTING, run, stepped_config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, its tokenizer and pairs; not to be changed."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Outcome]]:
    """A complete run of two steps, by kind; trained once, not to be changed."""
    runs: dict[str, tuple[Path, Outcome]] = {}

    def finish(kind: str) -> tuple[Path, Outcome]:
        if kind not in runs:
            output = tmp_path_factory.mktemp(kind) / "run"
            [outcome] = workers.run(run, 1, stepped_config(tiny, output, kind, EXPORTING))
            assert outcome.code == 0, outcome.printed
            runs[kind] = output, outcome
        return runs[kind]

    return finish


@pytest.fixture(scope="session")
def first_step(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], Path]:
    """A run of two steps of which the first is complete; every test gets a copy."""
    runs: dict[str, Path] = {}

    def copy(kind: str, target: Path) -> Path:
        if kind not in runs:
            output = tmp_path_factory.mktemp(kind) / "run"
            file = stepped_config(tiny, output, kind, EXPORTING, sdpo={"only": 1})
            assert workers.run(run, 1, file)[0].code == 0
            runs[kind] = output
        return Path(shutil.copytree(runs[kind], target))

    return copy

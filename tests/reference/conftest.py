"""Input files of scoring, and caches made from them."""

from pathlib import Path
from typing import Any

import pytest

from .tiny_cache import Files, score, score_config, write_files


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, its tokenizer and pairs; tests must not change them."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def scored(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with a cache of every layer, made by one process."""
    output = tmp_path_factory.mktemp("scored") / "run"
    file = score_config(tiny, output, objective={"layers": "all"})
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0, printed
    return output

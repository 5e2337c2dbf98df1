"""Files that scoring reads, and caches that it made of them."""

from pathlib import Path
from typing import Any

import pytest

from .tiny_cache import Files, score, score_config, write_files


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, its tokenizer and pairs; not to be changed."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def scored(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run whose cache has every layer, made by one process."""
    output = tmp_path_factory.mktemp("scored") / "run"
    file = score_config(tiny, output, objective={"layers": "all"})
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0, printed
    return output

"""Models to compare."""

import pytest

from .tiny_evaluation import Models, write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two tiny models, their tokenizer and pairs; read-only."""
    return write_models(tmp_path_factory.mktemp("models"))

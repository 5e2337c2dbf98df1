"""Files that runs of several steps read."""

import pytest

from ..train.tiny_run import Files, write_files


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, its tokenizer and pairs; not to be changed."""
    return write_files(tmp_path_factory.mktemp("tiny"))

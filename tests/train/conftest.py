"""Files that whole runs read."""

import pytest

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.data.run_pairs import load_run_pairs
from tests import oracle

from .tiny_run import Files, write_config, write_files


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, its tokenizer and pairs; not to be changed."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pairs(tiny: Files, tmp_path_factory: pytest.TempPathFactory) -> list[oracle.Pair]:
    """Tokens of all pairs, in the order of the data."""
    file = write_config(tiny, tmp_path_factory.mktemp("pairs") / "run")
    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    return [
        (pair.prompt_tokens.tolist(), pair.chosen_tokens.tolist(), pair.rejected_tokens.tolist())
        for pair in load_run_pairs(config).train
    ]

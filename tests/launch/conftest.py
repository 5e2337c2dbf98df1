"""Input files of runs on two machines, and the result of one that nothing has disturbed."""

from pathlib import Path

import pytest

from tests.train.tiny_run import Files, run, write_files

from .two_node_runs import START_S, config


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def undisturbed(files, workers, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    workers.run(run, 2, config(files, output), timeout_s=START_S)
    return output

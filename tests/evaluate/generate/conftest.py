"""Fixtures of the tests of `generate`."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .tiny_answers import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; read only."""
    return write_model(tmp_path_factory.mktemp("model") / "m", initializer_range=0.2)


@pytest.fixture(autouse=True)
def captured_log(caplog: pytest.LogCaptureFixture) -> None:
    """`caplog` contains the messages that the command line prints."""
    caplog.set_level(logging.INFO, "megatron_idpo")


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster with one thread, most of all where tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

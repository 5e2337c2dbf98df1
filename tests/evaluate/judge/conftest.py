"""Fixtures of the judge's tests."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .judge_case import KEY, KEY_VARIABLE


@pytest.fixture(autouse=True)
def key_is_never_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Sets the key; no test may write it to a file or the log."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level(logging.INFO, "megatron_idpo")
    yield
    assert KEY not in caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture(autouse=True)
def pauses_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses of the openai client before its retries; they are recorded and not waited for."""
    recorded: list[float] = []

    async def sleep(seconds: float) -> None:
        recorded.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr("anyio.sleep", sleep)
    return recorded


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster with one thread, most of all where tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Caches: killed at every moment and finished, refused when they are of something else."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.reference import cache_files
from megatron_idpo.reference.cache import CacheWriter, held, is_complete, open_cache

from .tiny_cache import fingerprint, logps

PART_PAIRS = 4


def make(directory: Path) -> None:
    """A cache of ten pairs in three parts, or what is missing of it."""
    writer = CacheWriter(directory, fingerprint())
    while writer.done_pairs < 10:
        writer.add(logps()[writer.done_pairs :][:PART_PAIRS])
        writer.write_part()
    writer.finish()


class Killed(BaseException):
    """Ends the work wherever it is."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool) -> Iterator[list[int]]:
    """A kill just before or after a file gets its name for the `number`-th time."""
    calls: list[int] = []

    def replace(*args: Path) -> None:
        calls.append(len(calls))
        if len(calls) == number and before:
            raise Killed
        os.rename(*args)
        if len(calls) == number:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cache_files.os, "replace", replace)
        yield calls


def test_killed_at_any_moment_it_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(monkeypatch, 0, before=True) as calls:
        make(tmp_path / "whole")
    assert len(calls) == 6, "the beginning, three parts, table and fingerprint"
    whole = (tmp_path / "whole" / "reference.parquet").read_bytes()
    for number in range(1, len(calls) + 1):
        for before in (True, False):
            directory = tmp_path / f"{number}-{before}"
            with killed_at(monkeypatch, number, before=before), pytest.raises(Killed):
                make(directory)
            finished = is_complete(directory, fingerprint())
            assert finished == (number == len(calls) and not before)
            if not finished:
                make(directory)
            assert (directory / "reference.parquet").read_bytes() == whole
            np.testing.assert_array_equal(open_cache(directory, fingerprint()).logps_PL2, logps())


def test_parts_that_are_there_are_not_done_again(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps()[:3])
    writer.add(logps()[3:7])
    writer.write_part()
    writer.add(logps()[7:])
    assert CacheWriter(tmp_path, fingerprint()).done_pairs == 7


def test_a_finished_cache_is_its_two_files(tmp_path: Path) -> None:
    make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"reference.parquet", "fingerprint.json"}


def test_some_of_its_layers(tmp_path: Path) -> None:
    make(tmp_path)
    found = open_cache(tmp_path, fingerprint(layers=(4,)))
    assert found.layers == (4,)
    np.testing.assert_array_equal(found.logps_PL2, logps()[:, 1:])


@pytest.mark.parametrize(
    ("state", "use"),
    [
        ("finished", is_complete),
        ("finished", open_cache),
        ("begun", is_complete),
        ("begun", open_cache),
        ("begun", CacheWriter),
    ],
)
def test_the_cache_of_something_else_is_refused(
    tmp_path: Path, state: str, use: Callable[..., object]
) -> None:
    if state == "finished":
        make(tmp_path)
    else:
        CacheWriter(tmp_path, fingerprint())
    other = fingerprint(dtype="bf16", truncation="drop")
    with pytest.raises(CheckpointError) as refused:
        use(tmp_path, other)
    message = str(refused.value)
    assert str(tmp_path) in message
    assert "model.dtype is fp32, here bf16" in message and "data.truncation" in message


def test_parts_with_other_layers_are_refused(tmp_path: Path) -> None:
    CacheWriter(tmp_path, fingerprint(layers=(1, 2, 4)))
    with pytest.raises(CheckpointError, match="unfinished, with the layers 1, 2, 4"):
        CacheWriter(tmp_path, fingerprint(layers=(2, 4)))


def test_no_byte_of_a_finished_cache_changes_unnoticed(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("reference.parquet", "fingerprint.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            changed = bytearray(whole)
            changed[at] ^= 1
            path.write_bytes(changed)
            if _is_space(whole, changed):
                continue
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                open_cache(tmp_path, fingerprint())
        path.write_bytes(whole)


def _is_space(one: bytes, other: bytes) -> bool:
    """Whether both are the same values: JSON may have its spaces elsewhere."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_table_without_its_fingerprint_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(CheckpointError, match=r"reference\.parquet.*no fingerprint\.json"):
        is_complete(tmp_path, fingerprint())


def test_a_missing_table_is_reported(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "reference.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"reference\.parquet"):
        open_cache(tmp_path, fingerprint())


def test_a_part_that_is_missing_is_reported(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    for first in (0, 4):
        writer.add(logps()[first : first + 4])
        writer.write_part()
    (tmp_path / "parts" / "part-000000000000.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"part-000000000004.*should come before it"):
        CacheWriter(tmp_path, fingerprint())


def test_a_damaged_part_is_reported(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps())
    writer.write_part()
    part = tmp_path / "parts" / "part-000000000000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="part-000000000000"):
        CacheWriter(tmp_path, fingerprint())


def test_nothing_there_is_no_cache(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "none", fingerprint())
    with pytest.raises(CheckpointError, match="no finished cache"):
        open_cache(tmp_path / "none", fingerprint())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(CheckpointError, match="is being written"), held(tmp_path):
            pass
    with held(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/cache"), held(tmp_path / "file" / "cache"):
        pass

"""Caches: resumed after a kill at any time, refused if made from other inputs or damaged."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, OutputLockedError
from megatron_idpo.reference.cache import CacheWriter, is_complete, lock_cache, open_cache

from .tiny_cache import fingerprint, logps

PART_PAIRS = 4


def write_cache(directory: Path) -> None:
    """Write a cache of ten pairs in three parts, or the rest of it."""
    writer = CacheWriter(directory, fingerprint())
    while writer.done_pairs < 10:
        writer.add(logps()[writer.done_pairs :][:PART_PAIRS])
        writer.write_part()
    writer.finish()


class Killed(BaseException):
    """Ends the process like a signal would."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, rename: int, *, before: bool) -> Iterator[list[int]]:
    """Kill just before or after the `rename`-th file gets its final name."""
    calls: list[int] = []

    def replace(*args: Path) -> None:
        calls.append(len(calls))
        if len(calls) == rename and before:
            raise Killed
        os.rename(*args)
        if len(calls) == rename:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        yield calls


def test_cache_is_completed_after_a_kill_at_any_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(monkeypatch, 0, before=True) as calls:
        write_cache(tmp_path / "whole")
    assert len(calls) == 6, "the fingerprint of the parts, three parts, table and fingerprint"
    whole = (tmp_path / "whole" / "reference.parquet").read_bytes()
    for rename in range(1, len(calls) + 1):
        for before in (True, False):
            directory = tmp_path / f"{rename}-{before}"
            with killed_at(monkeypatch, rename, before=before), pytest.raises(Killed):
                write_cache(directory)
            finished = is_complete(directory, fingerprint())
            assert finished == (rename == len(calls) and not before)
            if not finished:
                write_cache(directory)
            assert (directory / "reference.parquet").read_bytes() == whole
            np.testing.assert_array_equal(open_cache(directory, fingerprint()), logps())


def test_writer_continues_after_the_existing_parts(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps()[:3])
    writer.add(logps()[3:7])
    writer.write_part()
    writer.add(logps()[7:])
    assert CacheWriter(tmp_path, fingerprint()).done_pairs == 7


def test_batch_without_pairs_writes_no_part(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps()[:4])
    writer.write_part()
    for _ in range(2):  # an empty rest, as after a kill between the last part and the fingerprint
        writer.add(logps()[:0])
        writer.write_part()
    assert CacheWriter(tmp_path, fingerprint()).done_pairs == 4


def test_complete_cache_has_two_files(tmp_path: Path) -> None:
    write_cache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"reference.parquet", "fingerprint.json"}


def test_open_selects_layers(tmp_path: Path) -> None:
    write_cache(tmp_path)
    selected = open_cache(tmp_path, fingerprint(layers=(4,)))
    np.testing.assert_array_equal(selected, logps()[:, 1:])


@pytest.mark.parametrize(
    ("state", "use"),
    [
        ("complete", is_complete),
        ("complete", open_cache),
        ("begun", is_complete),
        ("begun", open_cache),
        ("begun", CacheWriter),
    ],
)
def test_cache_of_other_inputs_is_refused(
    tmp_path: Path, state: str, use: Callable[..., object]
) -> None:
    if state == "complete":
        write_cache(tmp_path)
    else:
        CacheWriter(tmp_path, fingerprint())
    other = fingerprint(dtype="bf16", truncation="drop")
    with pytest.raises(CheckpointError) as refused:
        use(tmp_path, other)
    message = str(refused.value)
    assert str(tmp_path) in message
    assert "model.dtype was fp32, is now bf16" in message and "data.truncation" in message


def test_parts_with_other_layers_are_refused(tmp_path: Path) -> None:
    CacheWriter(tmp_path, fingerprint(layers=(1, 2, 4)))
    with pytest.raises(CheckpointError, match="incomplete, with the layers 1, 2, 4"):
        CacheWriter(tmp_path, fingerprint(layers=(2, 4)))


def test_changed_byte_of_a_complete_cache_is_detected(tmp_path: Path) -> None:
    write_cache(tmp_path)
    for name in ("reference.parquet", "fingerprint.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 23):
            changed = bytearray(whole)
            changed[at] ^= 1
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                open_cache(tmp_path, fingerprint())
        path.write_bytes(whole)


def test_table_without_fingerprint_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(CheckpointError, match=r"reference\.parquet.*no fingerprint\.json"):
        is_complete(tmp_path, fingerprint())


def test_missing_table_is_reported(tmp_path: Path) -> None:
    write_cache(tmp_path)
    (tmp_path / "reference.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"reference\.parquet"):
        open_cache(tmp_path, fingerprint())


def test_missing_part_is_reported(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    for first in (0, 4):
        writer.add(logps()[first : first + 4])
        writer.write_part()
    part(tmp_path).unlink()
    message = r"part-000000000004-\w+\.parquet: does not begin with pair 0, .*; delete .*parts to"
    with pytest.raises(CheckpointError, match=message):
        CacheWriter(tmp_path, fingerprint())


def test_damaged_part_is_reported(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps())
    writer.write_part()
    path = part(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"part-0{12}-\w+\.parquet: has been changed"):
            CacheWriter(tmp_path, fingerprint())


def part(directory: Path, first: int = 0) -> Path:
    (path,) = (directory / "parts").glob(f"part-{first:012d}-*.parquet")
    return path


def test_part_of_another_cache_is_refused(tmp_path: Path) -> None:
    """Both have the same pairs and layers, and the part is intact."""
    for name in ("one", "other"):
        writer = CacheWriter(tmp_path / name, fingerprint(dtype={"one": "fp32"}.get(name, "bf16")))
        writer.add(logps())
        writer.write_part()
    moved = part(tmp_path / "other")
    part(tmp_path / "one").unlink()
    moved.rename(tmp_path / "one" / "parts" / moved.name)
    with pytest.raises(CheckpointError, match="belongs to another cache"):
        CacheWriter(tmp_path / "one", fingerprint())


def test_pairs_may_be_added_in_another_order(tmp_path: Path) -> None:
    """After a kill too; the table has the dataset's order; a part of another order is refused."""
    order_P, logps_PL2 = np.random.default_rng(1).permutation(10), logps()
    writer = CacheWriter(tmp_path, fingerprint(), order_P)
    writer.add(logps_PL2[order_P[:4]])
    writer.write_part()
    with pytest.raises(CheckpointError, match=r"another cache or another data\.seed"):
        CacheWriter(tmp_path, fingerprint())
    resumed = CacheWriter(tmp_path, fingerprint(), order_P)
    resumed.add(logps_PL2[order_P[resumed.done_pairs :]])
    resumed.finish()
    np.testing.assert_array_equal(open_cache(tmp_path, fingerprint()), logps_PL2)


def test_missing_cache_is_incomplete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "none", fingerprint())
    with pytest.raises(CheckpointError, match="no complete cache"):
        open_cache(tmp_path / "none", fingerprint())


def test_only_one_process_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss, the lock of the lost process is not an error of the user."""
    monkeypatch.setattr("megatron_idpo.storage.lock._LOST_HOLDER_S", 0.01)
    with lock_cache(tmp_path):
        with pytest.raises(ConfigError, match="is being written") as raised, lock_cache(tmp_path):
            pass
        assert raised.value.exit_code == EXIT_USER_ERROR
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with pytest.raises(OutputLockedError), lock_cache(tmp_path):
            pass
    with lock_cache(tmp_path):
        pass


def test_unwritable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="file/cache"),
        lock_cache(tmp_path / "file" / "cache"),
    ):
        pass

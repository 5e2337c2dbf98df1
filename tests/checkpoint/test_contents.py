"""`checksums.json`: every change of a checkpoint's files is noticed when they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_idpo.checkpoint.contents import (
    FILE,
    contents_if_recorded,
    read_contents,
    write_contents,
)
from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.checksums import checksum
from megatron_idpo.storage.sealed import read_sealed, write_sealed
from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

SHARD = b"first piece, second piece"
PIECES = {"__0_0.distcp": {"0": checksum(SHARD[:11]), "13": checksum(SHARD[13:])}}
STEP = "step-00000004"

LOAD_S = 5.0
"""Bound of loading the tiny training state once, on a busy machine."""


def checkpoint(root: Path, *, is_state: bool = True) -> Path:
    """A directory with a shard of two pieces and one other file."""
    directory = root / STEP
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(SHARD)
    (directory / "progress.json").write_text('{"optimizer_steps": 4}')
    write_contents(directory, PIECES, target=directory if is_state else None)
    return directory


def test_pieces_are_compared_one_by_one(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    contents = read_contents(directory, is_state=True)
    assert list(contents.files) == ["progress.json"]
    with (directory / "__0_0.distcp").open("r+b", buffering=0) as file:
        arguments = [(file, "__0_0.distcp", 0, 11), (file, "__0_0.distcp", 13, 12)]
        assert all(contents.is_unchanged(*each) for each in arguments)
        file.seek(14)
        file.write(b"E")
        assert [contents.is_unchanged(*each) for each in arguments] == [True, False]
        assert not contents.is_unchanged(file, "__0_0.distcp", 1, 10), "no such piece"
        assert not contents.is_unchanged(file, "__1_0.distcp", 0, 11), "no such file"


def test_renamed_training_state_is_refused_but_not_renamed_weights(tmp_path: Path) -> None:
    for is_state in (True, False):
        renamed = checkpoint(tmp_path / str(is_state), is_state=is_state).with_name("step-00000008")
        (renamed.parent / STEP).rename(renamed)
        if not is_state:
            assert contents_if_recorded(renamed) is not None
            continue
        message = (
            rf"{renamed}: was written as {STEP}; rename it back, or restore .* delete {renamed}"
        )
        with pytest.raises(CheckpointError, match=message):
            read_contents(renamed, is_state=True)


def test_weights_are_not_a_training_state(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        read_contents(checkpoint(tmp_path, is_state=False), is_state=True)


def test_checkpoint_without_the_record(tmp_path: Path) -> None:
    """Weights may come from another program; a training state without it is refused."""
    directory = checkpoint(tmp_path)
    (directory / FILE).unlink()
    assert contents_if_recorded(directory) is None
    message = rf"{FILE}: cannot be read: No such file .* delete {directory} to resume from the ch"
    with pytest.raises(CheckpointError, match=message):
        read_contents(directory, is_state=True)


def test_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / FILE
    values = read_sealed(path, remedy="", indent=None)
    write_sealed(path, {**values, "format": 9}, indent=None)
    with pytest.raises(CheckpointError, match="was written by another version of megatron-idpo"):
        read_contents(path.parent, is_state=True)


def damage_bit_by_bit(model: str, root: str, count: int) -> dict[str, int]:
    """Flips single bits of each file of a saved step; how many were refused, by file."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, Setup())
    training.step(1)
    checkpoints = Checkpoints(Path(root))
    checkpoints.save(training.chunks, training.optimizer, progress(1))
    info = checkpoints.wait()
    assert info is not None
    refused = {}
    for path in sorted(info.directory.iterdir()):
        refused[path.name] = 0
        for content in flipped_bits(path.read_bytes(), count):
            with replaced(path, content):
                try:
                    checkpoints.load(info, training.chunks, training.optimizer)
                except CheckpointError as error:
                    assert str(path) in str(error)
                    refused[path.name] += 1
    checkpoints.load(info, training.chunks, training.optimizer)
    return refused


def flipped_bits(content: bytes, count: int) -> Iterator[bytes]:
    random = Random(len(content))
    for bit in random.sample(range(8 * len(content)), count):
        at = bit // 8
        yield content[:at] + bytes([content[at] ^ 1 << bit % 8]) + content[at + 1 :]


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_every_flipped_bit_of_a_training_state_is_refused(
    workers: Any, tmp_path: Path, count: int
) -> None:
    model = str(write_tiny_hf_model(tmp_path / "model", "llama", **tiny.SIZES))
    arguments = (model, str(tmp_path / "checkpoints"), count)
    (refused,) = workers.run(damage_bit_by_bit, 1, *arguments, timeout_s=LOAD_S * 5 * count)
    names = (".metadata", "__0_0.distcp", "checksums.json", "metadata.json", "progress.json")
    assert refused == dict.fromkeys(names, count)

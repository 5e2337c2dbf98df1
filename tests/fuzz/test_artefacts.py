"""Damaged artefacts: refused with one line that names a file, or read with the original content.

Weights of other programs have no checksums. What is read of a damaged file is then compared with
what plain code reads of the same bytes.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed import checkpoint as torch_checkpoint

from megatron_idpo.checkpoint.contents import read_contents, write_contents
from megatron_idpo.checkpoint.dcp_io import Writer
from megatron_idpo.checkpoint.dcp_metadata import read_dcp_metadata
from megatron_idpo.checkpoint.dcp_planner import read_chunks
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import CHECKSUMS
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.tokenize.store import (
    COLUMNS,
    PairStore,
    PairStoreWriter,
    TokenBatch,
    arrow_schema,
)
from megatron_idpo.errors import UserError
from megatron_idpo.reference.cache import CacheWriter, open_cache
from megatron_idpo.storage.sealed import read_sealed, write_sealed

from ..convert.checked_file import write_checked
from ..reference.tiny_cache import fingerprint, logps
from .budget import count, inputs

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}
PAIRS = [([1], [2, 3], [4]), ([5, 6], [7], [8, 9]), ([10], [11], [12])]
FINGERPRINT = fingerprint(pairs=20, layers=(2, 4))
LOGPS_PL2 = logps(pairs=20)


@dataclass(frozen=True)
class Kind:
    """An artefact: how it is written into a directory, and all that a run reads from it."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    second: Callable[[Path], Any] | None = None
    """Plain code that reads the same from a damaged artefact; None: it has to be undamaged."""


def _write_sealed(directory: Path) -> None:
    write_sealed(directory / "manifest.json", {"steps": [1, 2], "name": "é"})


def _read_sealed(directory: Path) -> Any:
    return read_sealed(directory / "manifest.json", remedy="restore it")


def _write_state(directory: Path) -> None:
    writer = Writer(directory, directory)
    planner = torch_checkpoint.DefaultSavePlanner()
    planner.writing = "a tensor"  # type: ignore[attr-defined]
    torch_checkpoint.save(dict(TENSORS), storage_writer=writer, planner=planner, no_dist=True)
    (directory / "progress.json").write_text('{"step": 4}')
    write_contents(directory, writer.pieces, target=directory)


def _read_state(directory: Path) -> Any:
    contents = read_contents(directory, is_state=True)
    contents.check_files()
    chunks = [
        TensorChunk(key, tuple(tensor.shape), (0,) * tensor.dim(), torch.zeros_like(tensor))
        for key, tensor in TENSORS.items()
    ]
    read_chunks(chunks, directory, contents)
    return [chunk.tensor.tolist() for chunk in chunks]


def _read_list(directory: Path) -> Any:
    """What our reader accepts; pickle's second reading of it is safe and equal."""
    read = read_dcp_metadata(directory)
    assert read == pickle.loads((directory / ".metadata").read_bytes())
    return "readable"


def _write_pairs(directory: Path) -> None:
    records = [
        {**dict(zip(COLUMNS, pair, strict=True)), "part": 0, "row": row}
        for row, pair in enumerate(PAIRS)
    ]
    pairs = pa.RecordBatch.from_pylist(records, arrow_schema())
    with closing(PairStoreWriter(directory, directory.name)) as writer:
        writer.append(TokenBatch(pairs=pairs, bad_rows=(), report=DataReport(kept_pairs=3)))
        writer.finish()


def _read_pairs(directory: Path) -> Any:
    store = PairStore(directory)
    pairs = [[part.tolist() for part in store.tokens(at)] for at in range(store.num_pairs)]
    return pairs, store.lengths_P3.tolist(), list(store.bad_rows()), store.fingerprint


def _write_logps(directory: Path) -> None:
    writer = CacheWriter(directory, FINGERPRINT)
    writer.add(LOGPS_PL2)
    writer.finish()


def _read_logps(directory: Path) -> Any:
    return open_cache(directory, FINGERPRINT).tobytes()


def _write_export(directory: Path) -> None:
    write_checked(directory / "model.safetensors", TENSORS)


def _write_model(directory: Path) -> None:
    save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})


def _read_model(directory: Path) -> Any:
    checkpoint = HfCheckpoint(directory)
    checkpoint.verify()
    checkpoint.check({name: tuple(tensor.shape) for name, tensor in TENSORS.items()})
    read = {name: checkpoint.read(name) for name in TENSORS}
    return {name: (one.dtype, one.numpy().tobytes()) for name, one in read.items()}


DTYPES = {"F32": torch.float32, "I32": torch.int32, "U32": torch.uint32}


def _parse_model(directory: Path) -> Any:
    """A file of weights by its documented layout: a length, a header in JSON, and the data."""
    content = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    parsed = {}
    for name in TENSORS:
        first, last = header[name]["data_offsets"]
        parsed[name] = DTYPES[header[name]["dtype"]], content[start + first : start + last]
    return parsed


def _parse_export(directory: Path) -> Any:
    """The undamaged tensors, unless the name of the checksums itself is damaged."""
    content = (directory / "model.safetensors").read_bytes()
    if CHECKSUMS.encode() not in content:
        return _parse_model(directory)
    return {name: (one.dtype, one.numpy().tobytes()) for name, one in TENSORS.items()}


KINDS = {
    "sealed record": Kind(_write_sealed, _read_sealed),
    "training state": Kind(_write_state, _read_state),
    "list of tensors": Kind(_write_state, _read_list),
    "tokenized pairs": Kind(_write_pairs, _read_pairs),
    "log-probabilities": Kind(_write_logps, _read_logps),
    "exported weights": Kind(_write_export, _read_model, _parse_export),
    "weights of others": Kind(_write_model, _read_model, _parse_model),
}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, undamaged."""
    made = {}
    for name, kind in KINDS.items():
        made[name] = tmp_path_factory.mktemp("artefact") / "step-4"
        made[name].mkdir()
        kind.write(made[name])
    return made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the damaged copy is."""
    yield tmp_path_factory.mktemp("damaged")


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """What, where in the file from 0 to 1, and a number for it."""
    what = st.sampled_from(["flip", "flip", "flip", "cut", "zero", "repeat", "swap", "delete"])
    return draw(
        st.lists(st.tuples(what, st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
    )


def apply(damage: tuple[str, float, int], directory: Path, file: float) -> None:
    what, place, number = damage
    paths = sorted(directory.iterdir())
    if not paths:
        return
    path = paths[min(int(file * len(paths)), len(paths) - 1)]
    content = bytearray(path.read_bytes())
    at = min(int(place * len(content)), max(len(content) - 1, 0))
    if what == "delete":
        path.unlink()
        return
    if what == "swap":
        other = paths[number % len(paths)]
        content, swapped = bytearray(other.read_bytes()), content
        other.write_bytes(swapped)
    elif what == "cut":
        del content[at:]
    elif what == "repeat":
        content[at:at] = content[at : at + number]
    elif what == "zero":
        content[at : at + number] = bytes(len(content[at : at + number]))
    elif content:
        content[at] ^= 1 << number % 8
    path.write_bytes(content)


@inputs(40)
@given(name=st.sampled_from(sorted(KINDS)), damage=damages(), file=st.floats(0, 1))
@example(name="training state", damage=[("flip", 0.5, 0)], file=0.0)
@example(name="training state", damage=[("swap", 0.0, 1)], file=0.0)
@example(name="tokenized pairs", damage=[("flip", 0.5, 0)], file=0.99)
@example(name="weights of others", damage=[("zero", 0.0, 0)], file=0.0)
@example(name="weights of others", damage=[("flip", 0.99, 0)], file=0.0)
@example(name="exported weights", damage=[("flip", 0.99, 0)], file=0.0)
@example(name="log-probabilities", damage=[("flip", 0.5, 0)], file=0.99)
@example(name="list of tensors", damage=[("cut", 0.9, 0)], file=0.0)
def test_damage_is_refused_or_harmless(
    artefacts: dict[str, Path], scratch: Path, name: str, damage: list[Any], file: float
) -> None:
    kind = KINDS[name]
    directory = scratch / "step-4"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(artefacts[name], directory)
    for one in damage:
        apply(one, directory, file)
    try:
        read = kind.read(directory)
    except UserError as error:
        count(f"artefacts, {name}", "refused")
        assert "\n" not in str(error) and "step-4" in str(error), error
        assert error.problems[0].remedy, error
        return
    count(f"artefacts, {name}", "read")
    assert read == (kind.second(directory) if kind.second else kind.read(artefacts[name]))

"""The list of tensors of a checkpoint: read as DCP writes it, and nothing else from it."""

import builtins
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_idpo.checkpoint.dcp_io import Reader
from megatron_idpo.checkpoint.dcp_metadata import FILE, read_dcp_metadata
from megatron_idpo.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint that DCP wrote: tensors of several dtypes and an object."""
    tensors = {f"t{n}": torch.zeros(2, 3, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    writer = torch_checkpoint.FileSystemWriter(tmp_path, single_file_per_rank=True)
    torch_checkpoint.save({**tensors, "object": {"a": [1]}}, storage_writer=writer, no_dist=True)
    return tmp_path


def put(directory: Path, value: object, protocol: int | None = None) -> None:
    (directory / FILE).write_bytes(pickle.dumps(value, protocol))


def metadata(**changes: object) -> Metadata:
    properties = TensorProperties(torch.float32)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    values: dict = {
        "state_dict_metadata": {"a": TensorStorageMetadata(properties, torch.Size([2]), [chunk])},
        "storage_data": {MetadataIndex("a", [0]): _StorageInfo("__0_0.distcp", 0, 8)},
    }
    return Metadata(**{**values, **changes})


def test_what_dcp_writes_is_read_as_pickle_reads_it(saved):
    assert read_dcp_metadata(saved) == pickle.loads((saved / FILE).read_bytes())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plans_of_megatron_core_are_read(tmp_path, protocol):
    plan = SavePlan([WriteItem(MetadataIndex("a", [0]), WriteItemType.SHARD)])
    written = metadata(planner_data={"a": ("a",)})
    written.all_local_plans = [plan]
    put(tmp_path, written, protocol)
    read = read_dcp_metadata(tmp_path)
    assert read == written and read.all_local_plans == [plan]


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


FUNCTIONS = {
    "os.system": (os.system, "touch PWNED"),
    "eval": (builtins.eval, "open('PWNED', 'w')"),
    "getattr": (builtins.getattr, Metadata, "__init__"),
    "torch.load": (torch.load, "PWNED"),
    "torch.hub.load": (torch.hub.load, "PWNED", "x"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_code_is_refused_wherever_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    bomb = Calls(*FUNCTIONS[name])
    for value in (bomb, metadata(planner_data=[bomb]), metadata(storage_data={"a": bomb})):
        put(tmp_path, value)
        with pytest.raises(CheckpointError, match=r"\.metadata: holds .* could run code; take"):
            read_dcp_metadata(tmp_path)
    assert not (tmp_path / "PWNED").exists()


def test_classes_are_not_changed(tmp_path):
    attack = pickle.PROTO + b"\x02" + b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    attack += b"N}\x8c\x07versionK\x07s\x86b."
    (tmp_path / FILE).write_bytes(attack)
    with pytest.raises(CheckpointError, match="holds a change of type, which no checkpoint has"):
        read_dcp_metadata(tmp_path)
    assert Metadata.version is None


def test_readers_of_tensors_use_it(tmp_path):
    put(tmp_path, Calls(os.system, "true"))
    with pytest.raises(CheckpointError, match="could run code"):
        Reader(tmp_path, None).read_metadata()


INVALID = {
    "not a list": {"a": 1},
    "no files": metadata(storage_data=None),
    "another directory": metadata(
        storage_data={MetadataIndex("a", [0]): _StorageInfo("../x.distcp", 0, 8)}
    ),
    "negative offset": metadata(
        storage_data={MetadataIndex("a", [0]): _StorageInfo("__0_0.distcp", -8, 8)}
    ),
    "larger chunk": metadata(
        state_dict_metadata={
            "a": TensorStorageMetadata(
                TensorProperties(torch.float32),
                torch.Size([2]),
                [ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))],
            )
        }
    ),
    "text for a shape": metadata(
        state_dict_metadata={
            "a": TensorStorageMetadata(TensorProperties(torch.float32), "ab", [])  # type: ignore
        }
    ),
}


@pytest.mark.parametrize(
    "nested",
    [b")" + b"\x85" * 200_000, b"(" * 200_000 + b"t" * 200_000, b")" + b"K\1\x86" * 100_000],
)
def test_deeply_nested_tuples_are_damage(tmp_path, nested):
    """Their hash, as keys, ended the process with SIGSEGV."""
    (tmp_path / FILE).write_bytes(b"\x80\x04}" + nested + b"Ns.")
    with pytest.raises(CheckpointError, match="tuples in more than 20 levels"):
        read_dcp_metadata(tmp_path)


@pytest.mark.parametrize("name", INVALID)
def test_what_dcp_does_not_write_is_damage(tmp_path, name):
    put(tmp_path, INVALID[name])
    with pytest.raises(CheckpointError, match=r"missing or damaged \(ValueError: .*; copy"):
        read_dcp_metadata(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing or damaged \(No such file or directory\)"):
        read_dcp_metadata(tmp_path)


def test_no_flipped_bit_ends_in_another_error(tmp_path):
    put(tmp_path, metadata())
    path, read = tmp_path / FILE, 0
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                read_dcp_metadata(tmp_path)
                read += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
    assert read < 8 * len(content) / 2
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_dcp_metadata(tmp_path)

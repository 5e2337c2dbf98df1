"""Writing Hugging Face weights: layout, shards, several processes, full disks, kills."""

import errno
import json
import os
import resource
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_idpo.convert.hf_io import writer as hf_writer
from megatron_idpo.convert.hf_io.reader import INDEX_FILE, SINGLE_FILE, HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import CHECKSUMS, TensorSpec
from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.errors import EXIT_PEER_LOST, CheckpointError
from megatron_idpo.storage import atomic


def weights_of(num: int = 5, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(8, 4 + i).to(dtype) for i in range(num)}


def specs_of(weights: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]


def writer_of(target: Path, weights: dict[str, Tensor], **options: Any) -> HfWriter:
    return HfWriter(target, specs_of(weights), token="t", **options)


def export(target: Path, weights: dict[str, Tensor], **options: Any) -> None:
    with writer_of(target, weights, **options) as writer:
        writer.begin()
        for name in reversed(weights):
            writer.write(name, weights[name])
        writer.finish()


def same_bits(first: Tensor, second: Tensor) -> bool:
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)]
    return (first.shape, first.dtype) == (second.shape, second.dtype) and torch.equal(*bits)


MIXED = {
    "b.scalar": torch.tensor(2.5),
    "a.empty": torch.empty(0, 3, dtype=torch.float16),
    "c.bf16": torch.randn(3, 5).bfloat16(),
    "d.fp8": torch.randn(7).to(torch.float8_e4m3fn),
    "e.transposed": torch.randn(4, 6).t(),
    "f.bool": torch.tensor([True, False]),
    "g.int64": torch.arange(3),
}


def test_single_file_equals_the_librarys_bytes(tmp_path: Path) -> None:
    export(tmp_path / "out", MIXED)
    contiguous = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    expected = save(contiguous, metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == expected
    assert [path.name for path in tmp_path.rglob("*")] == ["out", SINGLE_FILE]


@pytest.mark.parametrize("max_shard_bytes", [10**6, 20])
def test_changed_tensors_of_an_export_are_refused(tmp_path: Path, max_shard_bytes: int) -> None:
    """Flipped bits of the values, in one file and in several; reading alone notices none."""
    export(tmp_path / "out", MIXED, checksums=True, max_shard_bytes=max_shard_bytes)
    checkpoint = HfCheckpoint(tmp_path / "out")
    checkpoint.verify()
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in MIXED.items())
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        whole = file.read_bytes()
        for at in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 7):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            message = rf"{file.name}: has been changed since it was written \(in tensor '"
            with pytest.raises(CheckpointError, match=message):
                checkpoint.verify()
            with pytest.raises(CheckpointError, match=message):
                for share in range(3):
                    checkpoint.verify(share=share, shares=3)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "stride", [97, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some", "every bit"]
)
def test_flipped_bits_of_a_header_are_refused_or_harmless(tmp_path: Path, stride: int) -> None:
    """Each is an error by name, or changes nothing that is read."""
    export(tmp_path / "out", MIXED, checksums=True)
    file = tmp_path / "out" / SINGLE_FILE
    whole = file.read_bytes()
    refused = 0
    for bit in range(0, 8 * (8 + int.from_bytes(whole[:8], "little")), stride):
        at = bit // 8
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1 :])
        try:
            checkpoint = HfCheckpoint(tmp_path / "out")
            checkpoint.check({name: tuple(tensor.shape) for name, tensor in MIXED.items()})
            checkpoint.verify()
        except CheckpointError as error:
            assert str(file.parent) in str(error)
            refused += 1
            continue
        for name, tensor in MIXED.items():
            # Without the key of the checksums, a flipped bit of a dtype could change values.
            assert same_bits(checkpoint.read(name), tensor), (name, bit)
    assert refused > 1000 / stride


def test_conversions_have_no_checksums(tmp_path: Path) -> None:
    export(tmp_path / "out", MIXED)
    with safe_open(tmp_path / "out" / SINGLE_FILE, "pt") as file:
        assert CHECKSUMS not in file.metadata()


def test_metadata_is_written(tmp_path: Path) -> None:
    export(tmp_path / "out", MIXED, metadata={"made_by": "me"})
    with safe_open(tmp_path / "out" / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "me"}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    # The hub treats all empty tensors as one storage, stored with the first of them.
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda s: s.count(0) < 2),
    max_shard_bytes=st.integers(40, 200),
)
def test_shards_and_index_equal_the_hubs(
    tmp_path: Path, sizes: list[int], max_shard_bytes: int
) -> None:
    weights = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    export(tmp_path / "out", weights, max_shard_bytes=max_shard_bytes, overwrite=True)
    hub = split_torch_state_dict_into_shards(
        weights, max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    if hub.is_sharded:
        index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
        assert index["weight_map"] == hub.tensor_to_filename
        assert index["metadata"] == {"total_size": sum(sizes), "total_parameters": sum(sizes)}
    assert files == set(hub.filename_to_tensors) | ({INDEX_FILE} if hub.is_sharded else set())
    checkpoint = HfCheckpoint(tmp_path / "out")
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in weights.items())


def test_tensor_larger_than_a_shard_gets_its_own_file(tmp_path: Path) -> None:
    weights = {name: torch.zeros(size) for name, size in {"a": 1, "b": 99, "c": 1, "d": 1}.items()}
    export(tmp_path / "out", weights, max_shard_bytes=50)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert [file[6:11] for file in index["weight_map"].values()] == [
        "00001",
        "00002",
        *["00003"] * 2,
    ]


def test_transformers_loads_the_export(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    weights = dict(LlamaForCausalLM(config).bfloat16().state_dict())
    with writer_of(tmp_path / "out", weights, max_shard_bytes=3000) as writer:
        writer.begin()
        for name, tensor in weights.items():
            writer.write(name, tensor)
        config.save_pretrained(writer.incomplete)
        writer.finish()
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in weights.items())


def write_part(target: str) -> list[str]:
    """On every rank: writes every second tensor; returns the names."""
    rank = torch.distributed.get_rank()
    specs = specs_of(weights_of(7))
    writer = HfWriter(target, specs, token="t", max_shard_bytes=150)
    for spec in specs[rank::2]:
        writer.write(spec.name, torch.full(spec.shape, rank + 0.5, dtype=spec.dtype))
    return list(writer.flush())


@pytest.mark.distributed
def test_several_processes_write_the_same_files(workers: Any, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writer_of(target, weights_of(7), max_shard_bytes=150) as writer:
        writer.begin()
        parts = workers.run(write_part, 2, str(target))
        assert not target.exists()
        writer.finish([name for part in parts for name in part])
    checkpoint = HfCheckpoint(target)
    checkpoint.check({name: tuple(tensor.shape) for name, tensor in weights_of(7).items()})
    for i in range(7):
        assert checkpoint.read(f"layers.{i}.weight").unique().tolist() == [i % 2 + 0.5]


def test_missing_and_repeated_tensors_are_refused(tmp_path: Path) -> None:
    weights = weights_of(3)
    message = r"out/model\.safetensors: tensor 'layers.1.weight' \(and 1 others\) was not written"
    with (
        pytest.raises(CheckpointError, match=message),
        writer_of(tmp_path / "out", weights) as writer,
    ):
        writer.begin()
        writer.write("layers.0.weight", weights["layers.0.weight"])
        writer.finish()
    with (
        pytest.raises(CheckpointError, match=r"tensor 'layers.2.weight' was written twice"),
        writer_of(tmp_path / "out", weights) as writer,
    ):
        writer.begin()
        for name, tensor in weights.items():
            writer.write(name, tensor)
        writer.finish(["layers.2.weight"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("unknown", torch.zeros(8, 4)),
        ("layers.0.weight", torch.zeros(4, 8, dtype=torch.bfloat16)),
        ("layers.0.weight", torch.zeros(8, 4)),
    ],
)
def test_unplanned_tensor_is_an_internal_error(tmp_path: Path, name: str, tensor: Tensor) -> None:
    writer = writer_of(tmp_path / "out", weights_of(3))
    writer.begin()
    with pytest.raises(AssertionError, match="planned"):
        writer.write(name, tensor)


def test_export_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    export(target, weights_of(5), max_shard_bytes=100)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(target, weights_of(2))
    assert len(HfCheckpoint(target).names()) == 5
    export(target, weights_of(2), overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", SINGLE_FILE]


def test_directory_that_is_not_an_export_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(CheckpointError, match="is not a directory of Hugging Face weights"):
        export(tmp_path / "home", weights_of(2), overwrite=True)
    assert (tmp_path / "home" / "precious").exists()


Usage = namedtuple("Usage", "total used free")


def test_too_small_disk_is_reported_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: Usage(100, 0, 100))
    with pytest.raises(CheckpointError, match=r"out: needs \d+ bytes of disk, 100 are free; free"):
        export(tmp_path / "out", weights_of(2))
    assert list(tmp_path.iterdir()) == []


def full(code: int, after: int = 0) -> Callable[..., int]:
    """A system call that fails with this error after some successful calls."""
    calls = 0
    pwrite = os.pwrite

    def call(descriptor: int, *arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, *arguments)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("name", "after", "message"),
    [
        ("posix_fallocate", 0, r"00001-of-00002.*no space for its tensors, .*bytes; the whole"),
        ("pwrite", 2, r"00001-of-00002.*no space for tensor 'layers.0.weight', 64 bytes"),
        ("pwrite", 3, r"index\.json: .*no space for its header"),
        ("fsync", 0, r"00001-of-00002.*no space for its tensors, .*bytes"),
    ],
)
def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int, message: str, code: int
) -> None:
    monkeypatch.setattr(hf_writer.os, name, full(code, after))
    with pytest.raises(CheckpointError, match=message) as error:
        export(tmp_path / "out", weights_of(3), max_shard_bytes=160)
    assert "the disk or quota is full" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_io_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_writer.os, "pwrite", full(errno.EIO))
    message = r"model\.safetensors: tensor 'layers.2.weight' cannot be written: Input/output error"
    with pytest.raises(CheckpointError, match=message) as raised:
        export(tmp_path / "out", weights_of(3))
    assert raised.value.exit_code == EXIT_PEER_LOST
    assert list(tmp_path.iterdir()) == []


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(
        hf_writer.os, "pwrite", lambda descriptor, rest, at: pwrite(descriptor, rest[:7], at)
    )
    export(tmp_path / "out", weights_of(3))
    checkpoint = HfCheckpoint(tmp_path / "out")
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in weights_of(3).items())


def test_file_size_limit_of_the_system_is_reported(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*File too large"):
            export(tmp_path / "out", {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_export_does_not_look_complete(tmp_path: Path) -> None:
    """As a kill leaves it: every tensor is written, nothing is closed or deleted."""
    target = tmp_path / "out"
    unfinished = writer_of(target, weights_of(2))
    unfinished.begin()
    for name, tensor in weights_of(2).items():
        unfinished.write(name, tensor)
    assert not target.exists()
    (left,) = atomic.leftovers(target)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        HfCheckpoint(left)
    weights = {"a": torch.ones(2)}
    with HfWriter(target, specs_of(weights), token="other") as writer:
        writer.begin()
        writer.write("a", weights["a"])
        writer.finish()
    assert HfCheckpoint(target).names() == ["a"]

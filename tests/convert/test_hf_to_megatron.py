"""Hugging Face to Megatron-Core: refused sources, tied and legacy tensors, failures."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

TP2 = Layout(tensor=2)
WEIGHTS = "model.safetensors"

pytestmark = pytest.mark.distributed


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, in a directory that is otherwise empty."""
    copy = tmp_path / "hf"
    shutil.copytree(tiny_llama, copy)
    return copy


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\x20" * 64)


def lose_shard(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    names = sorted(weights)
    files = {"one.safetensors": names[:10], "two.safetensors": names[10:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / WEIGHTS).unlink()
    (directory / "two.safetensors").unlink()


def add_token(directory: Path) -> None:
    (directory / "vocab.json").write_text(json.dumps({"a": 0, "zz": 256}))


def wrong_shape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 63)


def transposed(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].T.contiguous()


def assert_one_line(message: str | None, expected: str) -> None:
    assert message is not None
    assert "\n" not in message
    assert re.search(expected, message), message


def assert_all_one_line(messages, expected):
    for message in messages:
        assert_one_line(message, expected)


def remaining(directory: Path) -> set[str]:
    """All entries, hidden ones included."""
    return {path.name for path in directory.iterdir()}


def other_format(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].half()


Damage = Callable[[Path], Any]

REFUSED: dict[str, tuple[Damage, str]] = {
    "truncated": (
        truncate,
        r"hf/model\.safetensors: is truncated, damaged .*file not fully covered; download",
    ),
    "corrupt": (garbage, r"hf/model\.safetensors: .* not a safetensors file"),
    "a missing shard": (
        lose_shard,
        r"hf/two\.safetensors: is missing; .*index\.json lists tensor 'model\.layers\.\d.* others",
    ),
    "a wrong shape": (
        lambda hf: change_weights(hf, wrong_shape),
        r"hf/model\.safetensors: tensor 'model\.layers\.2\.mlp\.up_proj\.weight' has shape "
        r"\(128, 63\), expected \(128, 64\)",
    ),
    "transposed": (
        lambda hf: change_weights(hf, transposed),
        r"tensor 'model\.layers\.0\.mlp\.down_proj\.weight' has shape",
    ),
    "a missing tensor": (
        lambda hf: change_weights(hf, lambda weights: weights.pop("model.norm.weight")),
        r"hf: tensor 'model\.norm\.weight' of shape \(64,\) is missing",
    ),
    "an unknown tensor": (
        lambda hf: change_weights(hf, lambda weights: weights.update(extra=torch.zeros(1))),
        r"hf/model\.safetensors: unexpected tensor 'extra' \(1,\)",
    ),
    "mixed dtypes": (
        lambda hf: change_weights(hf, other_format),
        r"hf: mixed dtypes: .*lm_head\.weight is torch\.float16.*; .*--dtype",
    ),
    "another architecture": (
        lambda hf: change_config(hf, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        r"hf/config\.json: .*gpt2.*llama, mistral, qwen2, qwen3",
    ),
    "an unsupported field": (lambda hf: change_config(hf, hidden_act="gelu"), r"hidden_act"),
    "no configuration": (
        lambda hf: (hf / "config.json").unlink(),
        r"hf/config\.json: cannot be read: No such file",
    ),
    "a broken configuration": (
        lambda hf: (hf / "config.json").write_text("{"),
        r"hf/config\.json: is not valid JSON",
    ),
    "a larger tokenizer": (
        add_token,
        r"hf/vocab\.json: token 'zz' has the id 256, but vocab_size in config\.json is 256",
    ),
    "no directory": (shutil.rmtree, r"hf: does not exist"),
}


@pytest.mark.parametrize(("damage", "expected"), REFUSED.values(), ids=REFUSED)
def test_unusable_source_is_reported_on_one_line(damage, expected, source, attempt_on, tmp_path):
    damage(source)
    (message,) = attempt_on("there", source, tmp_path / "out")
    assert_one_line(message, expected)
    assert remaining(tmp_path) <= {"hf"}


def codes(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = torch.ones_like(weights[name], dtype=torch.int8)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_quantized_model_is_refused(dtype, source, attempt_on, tmp_path):
    change_weights(source, codes)
    (message,) = attempt_on("there", source, tmp_path / "out", dtype=dtype)
    assert_one_line(
        message, r"hf: tensor 'model\.layers\.2\.mlp\.up_proj\.weight' is stored as .*8, not"
    )
    assert remaining(tmp_path) == {"hf"}


def too_large_for_fp16(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.v_proj.weight"][-1, -1] = 65520.0


def test_value_beyond_the_requested_dtype_is_refused(source, attempt_on, tmp_path):
    change_weights(source, too_large_for_fp16)
    messages = attempt_on("there", source, tmp_path / "out", TP2, dtype="fp16")
    assert_all_one_line(
        messages, r"tensor 'model\.layers\.1\.self_attn\.v_proj\.weight' .*\.float16"
    )
    assert attempt_on("there", source, tmp_path / "out", dtype="bf16") == [None]


def test_error_is_raised_on_all_ranks(source, attempt_on, tmp_path):
    truncate(source)
    first, second = attempt_on("there", source, tmp_path / "out", TP2)
    assert first == second
    assert_one_line(first, r"is truncated")


def test_layout_that_does_not_fit_is_refused(source, attempt_on, tmp_path):
    message = attempt_on("there", source, tmp_path / "out", Layout(pipeline=3))
    assert len(set(message)) == 1
    assert_one_line(message[0], r"layout\.pipeline: 4 layers do not divide evenly over 3 stages")
    assert remaining(tmp_path) == {"hf"}


@contextmanager
def small_blocks() -> Iterator[None]:
    from megatron_idpo.convert import hf_to_megatron

    with mock.patch.object(hf_to_megatron, "_BLOCK_BYTES", 1000):
        yield


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tied model that stores a copy of its output layer and a legacy buffer in fp32."""
    directory = write_tiny_hf_model(tmp_path / "hf", "llama", seed=2, tie_word_embeddings=True)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)

    change_weights(directory, add)
    return directory


def test_copy_of_a_tied_embedding_and_legacy_buffers_are_ignored(tied, attempt_on, tmp_path):
    between, out = tmp_path / "m", tmp_path / "out"
    assert attempt_on("there", tied, between, TP2, sabotage=small_blocks) == [None, None]
    assert attempt_on("back", between, out) == [None]
    expected = load_file(tied / WEIGHTS)
    del expected["lm_head.weight"]
    del expected["model.layers.3.self_attn.rotary_emb.inv_freq"]
    exported = load_file(out / WEIGHTS)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())


def other_last_value(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][-1, -1] += 1


def same_values_in_fp32(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].float()


@pytest.mark.parametrize("change", [other_last_value, same_values_in_fp32])
def test_output_layer_that_differs_from_its_tied_embedding_is_refused(
    change, tied, attempt_on, tmp_path
):
    change_weights(tied, change)
    message = attempt_on("there", tied, tmp_path / "m", TP2, sabotage=small_blocks)
    assert_one_line(
        message[0], r"hf: tensor 'lm_head\.weight' differs from 'model\.embed_tokens\.we"
    )
    assert message[1] == f"opening the checkpoint failed on rank 0: {message[0]}"
    assert remaining(tmp_path) == {"hf"}


def test_uncreatable_target_is_reported(source, attempt_on, tmp_path):
    (tmp_path / "file").touch()
    (message,) = attempt_on("there", source, tmp_path / "file" / "out")
    assert_one_line(message, r"file/out: cannot be created: (Not a directory|File exists)")
    (message,) = attempt_on("there", source, tmp_path / "file")
    assert_one_line(message, r"file: is a file; name a directory")
    assert remaining(tmp_path) == {"hf", "file"}


def test_checkpoint_is_replaced_only_with_overwrite(source, attempt_on, tmp_path):
    out = tmp_path / "out"
    assert attempt_on("there", source, out) == [None]
    before = sorted((path.name, path.read_bytes()) for path in out.glob("*.distcp"))
    (message,) = attempt_on("there", source, out)
    assert_one_line(message, r"out: exists and is not empty; .*overwrite")
    assert before == sorted((path.name, path.read_bytes()) for path in out.glob("*.distcp"))
    assert attempt_on("there", source, out, TP2, overwrite=True) == [None, None]
    assert {"__0_0.distcp", "__1_0.distcp"} < remaining(out)
    assert remaining(tmp_path) == {"hf", "out"}


def test_target_that_contains_the_source_is_refused(source, attempt_on, tmp_path):
    """Even if the target is a checkpoint, which may be replaced."""
    (tmp_path / "metadata.json").touch()
    message = attempt_on("there", source, tmp_path, TP2, overwrite=True)
    assert message[0] == message[1]
    assert_one_line(message[0], r": holds the source .*/hf; name another directory to write$")
    assert remaining(tmp_path) == {"hf", "metadata.json"}


def test_directory_that_is_not_a_checkpoint_is_not_replaced(source, attempt_on, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").touch()
    (message,) = attempt_on("there", source, home, overwrite=True)
    assert_one_line(message, r"home: exists and is not a checkpoint")
    assert remaining(home) == {"precious"}
    assert remaining(tmp_path) == {"hf", "home"}


def weight_bytes(source: Path) -> int:
    return sum(weight.nbytes for weight in load_file(source / WEIGHTS).values())


def test_too_small_disk_is_reported_before_any_work(source, attempt_on, tiny_disk):
    disk = tiny_disk(weight_bytes(source) - 8192)
    (message,) = attempt_on("there", source, disk / "out")
    assert_one_line(
        message, rf"out: needs {weight_bytes(source):,} bytes of disk, [\d,]+ are free; "
    )
    assert remaining(disk) == set()


@pytest.mark.parametrize("layout", [Layout(), TP2], ids=["one process", "TP2"])
def test_disk_that_becomes_full_leaves_nothing_behind(layout, source, attempt_on, tiny_disk):
    disk = tiny_disk(weight_bytes(source) + 16384)  # less than the overhead of the files
    message = attempt_on("there", source, disk / "out", layout)
    assert None not in message
    assert_one_line(
        message[0], r"out/__\d_0\.distcp: the disk or quota is full: no space for tensor '\w+\."
    )
    assert remaining(disk) == set()


@contextmanager
def unreadable_tensor() -> Iterator[None]:
    from megatron_idpo.convert.hf_io.reader import HfCheckpoint

    read = HfCheckpoint.read

    def cut_on_the_way(self, name, rows=None, columns=None):
        if name == "model.layers.1.mlp.up_proj.weight":
            # Replaced, not truncated in place: the other rank may have the old file mapped.
            empty = self.directory / "empty"
            empty.touch()
            empty.replace(self.directory / WEIGHTS)
        return read(self, name, rows, columns)

    with mock.patch.object(HfCheckpoint, "read", cut_on_the_way):
        yield


@contextmanager
def no_metadata() -> Iterator[None]:
    from torch.distributed.checkpoint import FileSystemWriter

    error = OSError(28, "No space left on device")
    with mock.patch.object(FileSystemWriter, "finish", side_effect=error):
        yield


@contextmanager
def no_publishing() -> Iterator[None]:
    from megatron_idpo.errors import CheckpointError
    from megatron_idpo.storage import atomic

    error = CheckpointError.at("out", "has been filled meanwhile")
    with mock.patch.object(atomic, "publish_directory", side_effect=error):
        yield


@contextmanager
def no_view_of_the_target() -> Iterator[None]:
    from megatron_idpo.checkpoint import model_directory as directory

    with mock.patch.object(directory.os, "access", return_value=False):
        yield


ALONE: list[tuple[Callable[[], Any], int, str]] = [
    (no_view_of_the_target, 1, r"out: cannot be written from every node of the run; .* share$"),
    (
        no_metadata,
        0,
        r"out/\.metadata: the disk or quota is full: no space for the list of tensors",
    ),
    (no_publishing, 0, r"out: has been filled meanwhile"),
    (unreadable_tensor, 1, r"hf/model\.safetensors: is truncated, damaged .*; download"),
]


@pytest.mark.parametrize(("sabotage", "rank", "expected"), ALONE)
def test_failure_of_one_rank_is_raised_on_all(
    sabotage, rank, expected, source, attempt_on, tmp_path
):
    messages = attempt_on("there", source, tmp_path / "out", TP2, sabotage=sabotage, rank=rank)
    assert_all_one_line(messages, expected)
    assert remaining(tmp_path) == {"hf"}


@pytest.mark.parametrize("rank", [0, 1])
def test_failed_write_of_one_rank_is_raised_on_all(rank, source, attempt_on, file_limit, tmp_path):
    messages = attempt_on("there", source, tmp_path / "out", TP2, sabotage=file_limit, rank=rank)
    assert_all_one_line(
        messages, rf"out/__{rank}_0\.distcp: tensor '[\w.]+' cannot be written: File too"
    )
    assert remaining(tmp_path) == {"hf"}

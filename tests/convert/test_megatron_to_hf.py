"""Megatron-Core to Hugging Face: damaged and mismatched checkpoints, failures."""

import json
import pickle
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

PP2 = Layout(pipeline=2)
WEIGHTS = "model.safetensors"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def converted(tiny_llama: Path, workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; read-only."""
    target = tmp_path_factory.mktemp("converted") / "m"
    workers.run(convert_there, 1, str(tiny_llama), str(target))
    return target


def convert_there(source: str, target: str) -> None:
    from megatron_idpo.convert.hf_to_megatron import convert

    convert(Path(source), Path(target))


@pytest.fixture
def source(converted: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, in a directory that is otherwise empty."""
    copy = tmp_path / "m"
    shutil.copytree(converted, copy)
    return copy


def assert_one_line(message: str | None, expected: str) -> None:
    assert message is not None
    assert "\n" not in message
    assert re.search(expected, message), message


def remaining(directory: Path) -> set[str]:
    """All entries, hidden ones included."""
    return {path.name for path in directory.iterdir()}


# ---- unusable checkpoints ----------------------------------------------------------------


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def overwrite_a_tensor(checkpoint: Path) -> None:
    """Overwrites a tensor's section of the file with zeros; keeps the size."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (info,) = [
        info
        for index, info in metadata.storage_data.items()
        if index.fqn == "decoder.final_layernorm.weight"
    ]
    path = checkpoint / info.relative_path
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + info.length] = bytes(info.length)
    path.write_bytes(content)


def add_token(checkpoint: Path) -> None:
    (checkpoint / "huggingface" / "vocab.json").write_text(json.dumps({"a": 0, "zz": 300}))


def store_as(checkpoint: Path, dtype: torch.dtype) -> None:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = dtype
    path.write_bytes(pickle.dumps(metadata))


Damage = Callable[[Path], Any]


def of_another_program(damage: Damage) -> Damage:
    """The damage to a checkpoint that has no `checksums.json`."""

    def apply(checkpoint: Path) -> None:
        (checkpoint / "checksums.json").unlink()
        damage(checkpoint)

    return apply


REFUSED: dict[str, tuple[Damage, str]] = {
    "no huggingface": (
        lambda m: shutil.rmtree(m / "huggingface"),
        r"m/huggingface: there is no config\.json; put the Hugging Face config\.json",
    ),
    "no config.json": (
        lambda m: (m / "huggingface" / "config.json").unlink(),
        r"m/huggingface: there is no config\.json",
    ),
    "truncated": (
        lambda m: cut(m / "__0_0.distcp", 5000),
        r"m/__0_0\.distcp: is truncated in or before tensor '[\w.]+', which ends at byte \d+: \d+",
    ),
    "a missing file": (
        lambda m: (m / "__0_0.distcp").unlink(),
        r"m/__0_0\.distcp: is missing; \.metadata lists tensor '[\w.]+'",
    ),
    "overwritten": (
        overwrite_a_tensor,
        r"m/__0_0\.distcp: has been changed since it was written \(in tensor "
        r"'decoder\.final_layernorm\.weight'\); copy the checkpoint here again$",
    ),
    "overwritten, without checksums": (
        of_another_program(overwrite_a_tensor),
        r"m/__0_0\.distcp: tensor 'decoder\.final_layernorm\.weight' cannot be read "
        r"\(the file is damaged\); copy the checkpoint here again$",
    ),
    "truncated metadata": (
        lambda m: cut(m / ".metadata", 50),
        r"m/\.metadata: has been changed since it was written; copy",
    ),
    "truncated metadata, without checksums": (
        of_another_program(lambda m: cut(m / ".metadata", 50)),
        r"m/\.metadata: is missing or damaged \(\w+: .*\); copy",
    ),
    "no metadata": (
        of_another_program(lambda m: (m / ".metadata").unlink()),
        r"m/\.metadata: is missing or damaged \(No such file",
    ),
    "no marker": (
        of_another_program(lambda m: (m / "metadata.json").unlink()),
        r"m: is not a Megatron-Core checkpoint \(no metadata\.json\); name a directory",
    ),
    "a broken marker": (
        of_another_program(lambda m: (m / "metadata.json").write_text("{")),
        r"m/metadata\.json: is missing or damaged",
    ),
    "another backend": (
        of_another_program(
            lambda m: (m / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        ),
        r"m/metadata\.json: the format is 'zarr', not 'torch_dist'",
    ),
    "changed checksums": (
        lambda m: cut(m / "checksums.json", 3),
        r"m/checksums\.json: has been changed since it was written; copy",
    ),
    "fewer layers": (
        lambda m: change_config(m, num_hidden_layers=2),
        r"m: is not the model .*: tensor 'decoder\.layers\.[\w.]+' has shape \(4, [\d, ]+\), "
        r"expected \(2, [\d, ]+\) \(and \d more differences\); put",
    ),
    "wider layers": (
        lambda m: change_config(m, intermediate_size=256),
        r"tensor 'decoder\.layers\.mlp\.linear_fc\d\.weight' has shape .* \(and 1 more",
    ),
    "a larger vocabulary": (
        lambda m: change_config(m, vocab_size=257),
        r"'embedding\.word_embeddings\.weight' has shape \(256, 64\), expected \(257, 64\)",
    ),
    "ties": (
        lambda m: change_config(m, tie_word_embeddings=True),
        r"tensor 'output_layer\.weight' of shape \(256, 64\) is not expected; put",
    ),
    "biases": (
        lambda m: change_config(m, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        r"'decoder\.layers\.self_attention\.linear_qkv\.bias' of shape \(4, 128\) is missing",
    ),
    "a larger tokenizer": (
        add_token,
        r"m/huggingface/vocab\.json: token 'zz' has the id 300, but vocab_size .* is 256",
    ),
    "an unsupported field": (
        lambda m: change_config(m, hidden_act="gelu"),
        r"m/huggingface/config\.json: hidden_act: 'gelu'",
    ),
    "integer weights": (
        of_another_program(lambda m: store_as(m, torch.int8)),
        r"m: tensor '[\w.]+' is stored as torch\.int8, not as floating",
    ),
    "no directory": (shutil.rmtree, r"m: does not exist; name a checkpoint"),
}


@pytest.mark.parametrize(("damage", "expected"), REFUSED.values(), ids=REFUSED)
def test_unusable_checkpoint_is_reported_on_one_line(
    damage, expected, source, attempt_on, tmp_path
):
    damage(source)
    (message,) = attempt_on("back", source, tmp_path / "out")
    assert_one_line(message, expected)
    assert remaining(tmp_path) <= {"m"}


def test_padding_of_the_vocabulary_is_removed(source, attempt_on, tmp_path):
    """Megatron-LM pads to a multiple of 128 x TP: here from 249 to 256 rows."""
    change_config(source, vocab_size=249)
    assert attempt_on("back", source, tmp_path / "out", Layout(tensor=2)) == [None] * 2
    exported = load_file(tmp_path / "out" / WEIGHTS)
    assert (
        exported["model.embed_tokens.weight"].shape == exported["lm_head.weight"].shape == (249, 64)
    )


def test_config_keeps_the_key_of_the_dtype(source, attempt_on, tmp_path):
    path = source / "huggingface" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert attempt_on("back", source, tmp_path / "out", dtype="fp16") == [None]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "float16"}
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_value_beyond_the_requested_dtype_is_refused(tiny_llama, attempt_on, tmp_path):
    hf, between = tmp_path / "hf", tmp_path / "m"
    shutil.copytree(tiny_llama, hf)
    weights = load_file(hf / WEIGHTS)
    weights["model.layers.3.mlp.down_proj.weight"][-1, -1] = 65520.0
    save_file(weights, hf / WEIGHTS, metadata={"format": "pt"})
    assert attempt_on("there", hf, between) == [None]
    for message in attempt_on("back", between, tmp_path / "out", PP2, dtype="fp16"):
        assert_one_line(
            message, r"m: tensor 'decoder\.layers\.mlp\.linear_fc2\.weight' .* in torch\.float16"
        )
    assert remaining(tmp_path) == {"hf", "m"}


@contextmanager
def slow_removal() -> Iterator[None]:
    import time

    from megatron_idpo.storage import atomic

    discard = atomic.discard_directory

    def slowly(directory: Path) -> None:
        time.sleep(0.2)
        discard(directory)

    with mock.patch.object(atomic, "discard_directory", slowly):
        yield


def fail_and_look(source: str, target: str) -> int:
    """On every rank: fails to publish; returns the number of leftovers when this rank may exit."""
    import torch.distributed as dist

    from megatron_idpo.convert.megatron_to_hf import convert
    from megatron_idpo.errors import CheckpointError
    from megatron_idpo.storage import atomic

    slow = (
        slow_removal() if dist.get_rank() == 0 else mock.patch.object(atomic, "discard_directory")
    )
    with slow, no_publishing(), pytest.raises(CheckpointError):
        convert(Path(source), Path(target), layout=PP2)
    return len(atomic.leftovers(Path(target)))


def test_no_rank_exits_before_the_export_is_deleted(source, workers, tmp_path):
    assert workers.run(fail_and_look, 2, str(source), str(tmp_path / "out")) == [0, 0]


# ---- targets -------------------------------------------------------------------------------------


def test_export_is_replaced_only_with_overwrite(source, attempt_on, tmp_path):
    out = tmp_path / "out"
    assert attempt_on("back", source, out) == [None]
    before = (out / WEIGHTS).read_bytes()
    (message,) = attempt_on("back", source, out)
    assert_one_line(message, r"out: exists and is not empty; .*overwrite")
    assert (out / WEIGHTS).read_bytes() == before
    message = attempt_on("back", source, out, PP2, overwrite=True, dtype="bf16")
    assert message == [None, None]
    assert (out / WEIGHTS).stat().st_size < len(before)
    assert remaining(tmp_path) == {"m", "out"}


def test_unusable_targets_are_refused(source, attempt_on, tmp_path):
    (tmp_path / "file").touch()
    (message,) = attempt_on("back", source, tmp_path / "file" / "out")
    assert_one_line(message, r"file/out: cannot be created: (Not a directory|File exists)")
    (message,) = attempt_on("back", source, source, overwrite=True)
    assert_one_line(message, r"m: is the source itself; name another directory to write$")
    (message,) = attempt_on("back", source, tmp_path, overwrite=True)
    assert_one_line(message, r": holds the source .*/m; name another directory to write$")
    assert remaining(tmp_path) == {"m", "file"}
    shutil.copytree(source, tmp_path / "other")
    (message,) = attempt_on("back", source, tmp_path / "other", overwrite=True)
    assert_one_line(message, r"other: exists and is not a directory of Hugging Face weights")


# ---- full disks and other failures ----------------------------------------------------


def test_too_small_disk_is_reported_before_any_work(source, attempt_on, tiny_disk):
    disk = tiny_disk(500_000)
    message = attempt_on("back", source, disk / "out", PP2)
    assert_one_line(message[0], r"out: needs [\d,]+ bytes of disk, [\d,]+ are free; free some")
    assert message[1] == f"preparing the export failed on rank 0: {message[0]}"
    assert remaining(disk) == set()


@contextmanager
def unreadable_file() -> Iterator[None]:
    from torch.distributed.checkpoint import FileSystemReader

    error = RuntimeError("PytorchStreamReader failed\nand more")
    with mock.patch.object(FileSystemReader, "read_data", side_effect=error):
        yield


@contextmanager
def failing_fsync() -> Iterator[None]:
    from megatron_idpo.convert.hf_io import writer as hf_writer

    error = OSError(28, "No space left on device")
    with mock.patch.object(hf_writer.os, "fsync", side_effect=error):
        yield


@contextmanager
def no_publishing() -> Iterator[None]:
    from megatron_idpo.errors import CheckpointError
    from megatron_idpo.storage import atomic

    error = CheckpointError.at("out", "has been filled meanwhile")
    with mock.patch.object(atomic, "publish_directory", side_effect=error):
        yield


ALONE: dict[str, tuple[Callable[[], Any], int, str]] = {
    "reading": (
        unreadable_file,
        1,
        r"m/__0_0\.distcp: tensor '[\w.]+' cannot be read \(the file is damaged\); copy",
    ),
    "writing": (
        failing_fsync,
        1,
        r"out/model\.safetensors: the disk or quota is full: no space for",
    ),
    "publishing": (no_publishing, 0, r"out: has been filled meanwhile"),
}


@pytest.mark.parametrize(("sabotage", "rank", "expected"), ALONE.values(), ids=ALONE)
def test_failure_of_one_rank_is_raised_on_all(
    sabotage, rank, expected, source, attempt_on, tmp_path
):
    messages = attempt_on("back", source, tmp_path / "out", PP2, sabotage=sabotage, rank=rank)
    for message in messages:
        assert_one_line(message, expected)
    assert remaining(tmp_path) == {"m"}


def test_failed_write_of_one_rank_is_raised_on_all(source, attempt_on, file_limit, tmp_path):
    messages = attempt_on("back", source, tmp_path / "out", PP2, sabotage=file_limit, rank=1)
    for message in messages:
        assert_one_line(message, r"model\.safetensors: tensor '[\w.]+' cannot be written: File too")
    assert remaining(tmp_path) == {"m"}

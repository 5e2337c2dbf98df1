"""Tokenizer files: the largest token id must be within the model's vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from megatron_idpo.convert.hf_io.reader import SINGLE_FILE, HfCheckpoint
from megatron_idpo.errors import CheckpointError

FAST = {"model": {"vocab": {"x": 0, "y": 5}}, "added_tokens": [{"id": 6, "content": "<s>"}]}
UNIGRAM = {"model": {"vocab": [["x", 0.0]] * 7}}


def open_checkpoint(directory: Path) -> HfCheckpoint:
    save_file({"a": torch.ones(1)}, directory / SINGLE_FILE)
    return HfCheckpoint(directory)


def write_json(directory: Path, **documents: Any) -> None:
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "documents",
    [
        {"tokenizer": FAST},
        {"tokenizer": UNIGRAM},
        {"vocab": {"x": 0}, "added_tokens": {"<s>": 6}},
        {"vocab": {}, "tokenizer_config": {"added_tokens_decoder": {"6": {"content": "<s>"}}}},
        {"tokenizer": FAST, "vocab": {"ignored, as in Transformers": 99}},
    ],
)
def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path, documents: Any) -> None:
    checkpoint = open_checkpoint(tmp_path)
    write_json(tmp_path, **documents, config={"vocab_size": 8})
    checkpoint.check_vocabulary()  # one embedding more is padding
    write_json(tmp_path, config={"vocab_size": 6})
    with pytest.raises(CheckpointError, match=r"json: token '.*' has the id 6, but .* is 6") as e:
        HfCheckpoint(tmp_path).check_vocabulary()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "document", [{}, {"model": {"vocab": 3}}, {"model": {"vocab": {"x": "y"}}}]
)
def test_broken_tokenizer_file_is_named(tmp_path: Path, document: Any) -> None:
    checkpoint = open_checkpoint(tmp_path)
    write_json(tmp_path, tokenizer=document, config={"vocab_size": 8})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a valid tokenizer file"):
        checkpoint.check_vocabulary()
    write_json(tmp_path, tokenizer=FAST, config={})
    with pytest.raises(CheckpointError, match=r"config\.json: vocab_size is None"):
        HfCheckpoint(tmp_path).check_vocabulary()


def test_sentencepiece_model_is_read(tmp_path: Path) -> None:
    prefix = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from, and some more"] * 9),
        model_prefix=str(prefix),
        vocab_size=18,
        minloglevel=2,
    )
    checkpoint = open_checkpoint(tmp_path)
    write_json(tmp_path, config={"vocab_size": 17})
    with pytest.raises(CheckpointError, match=r"has the id 17, but vocab_size"):
        checkpoint.check_vocabulary()
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not a valid tokenizer file"):
        HfCheckpoint(tmp_path).check_vocabulary()

"""Tokenizers small enough to be trained in a test, and a way to write JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from tests.data.trained_record import RecordReader

# A busy machine must not fail a property.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = [
    "The sky is blue today, and the sea is a deep green.",
    "What is the capital of France? The capital of France is Paris.",
    "I do not know what you mean by that; could you say it in another way?",
    "user\nassistant\nsystem\n\n\nYes.  No.  Perhaps.  12 34 567",
    "Human: how are you? Assistant: I am well, thank you.",
]


def _byte_bpe(*, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE without splitting into words, so that tokens merge across any boundary."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([s[i:] for s in SENTENCES for i in range(6)], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def text_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer's directory: BOS before every text, no chat template."""
    path = tmp_path_factory.mktemp("text_tokenizer")
    _byte_bpe(bos=True).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Neither BOS nor chat template."""
    path = tmp_path_factory.mktemp("bare_tokenizer")
    _byte_bpe(bos=False).save_pretrained(path)
    return load_tokenizer(str(path))


@pytest.fixture(scope="session")
def text_tokenizer(text_tokenizer_path: str) -> Tokenizer:
    """BOS before every text, no chat template."""
    return load_tokenizer(text_tokenizer_path)


@pytest.fixture(scope="session")
def chat_tokenizer(text_tokenizer_path: str) -> Tokenizer:
    """The same tokenizer with the ChatML template."""
    return load_tokenizer(text_tokenizer_path, CHATML)


@pytest.fixture(scope="session")
def read(text_tokenizer_path: str) -> RecordReader:
    """Reads and tokenizes one record; `RefusedError` if it is a bad row."""
    return RecordReader(text_tokenizer_path)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes records (or raw lines, as bytes) to a file and returns its path."""

    def write(records: list[Any], name: str = "pairs.jsonl") -> str:
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def unigram_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece unigram model's file, alone in its directory."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 4),
            model_writer=file,
            model_type="unigram",
            vocab_size=330,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path

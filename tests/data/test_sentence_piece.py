"""Sentencepiece models, against the library itself."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from megatron_idpo.data.sources.preferences import Preference
from megatron_idpo.data.tokenize.chat import TokenPair, encode_pairs, pair_text
from megatron_idpo.data.tokenize.sentencepiece import SentencePieceTokenizer
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(unigram_model: Path) -> Tokenizer:
    return load_tokenizer(str(unigram_model), TEMPLATE)


def test_text_is_encoded_as_the_library_does(tokenizer: Tokenizer, unigram_model: Path) -> None:
    library = SentencePieceProcessor(model_file=str(unigram_model))
    text = "The capital of France, é 漢!"
    bare = library.encode(text)
    assert tokenizer.encode([text], special_tokens=False) == [bare]
    assert tokenizer.encode([text], special_tokens=True) == [[library.bos_id(), *bare]]
    assert tokenizer.decode([1, *bare, 2]) == f"<s>{text}</s>"


def test_control_tokens_in_text_are_found(tokenizer: Tokenizer) -> None:
    [tokens] = tokenizer.encode(["<s>The</s><s>sky"], special_tokens=False)
    assert [token for token in tokens if token in (1, 2)] == [1, 2, 1]
    assert tokenizer.eos_id == 2 and tokenizer.eos_text == "</s>"
    assert tokenizer.special_ids == {1, 2}


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_chats_decode_to_their_templated_text(
    tokenizer: Tokenizer, question: str, chosen: str, rejected: str
) -> None:
    if chosen == rejected or "\0" in question + chosen + rejected:
        return
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    text = pair_text(Preference([{"role": "user", "content": question}], *answers), tokenizer)
    [pair] = encode_pairs([text], tokenizer)
    assert isinstance(pair, TokenPair) and not pair.unterminated
    # The model writes one space before every stretch of text, and decoding takes it away again.
    assert tokenizer.decode(pair.prompt + pair.chosen) == text.chosen
    assert pair.chosen[-1] == pair.rejected[-1] == 2


def test_the_config_beside_the_model_is_obeyed(unigram_model: Path, tmp_path: Path) -> None:
    shutil.copy(unigram_model, tmp_path / "tokenizer.model")
    config = {
        "add_bos_token": False,
        "eos_token": {"content": "<|end|>"},
        "added_tokens_decoder": {"900": {"content": "<|end|>"}},
        "chat_template": "{{ messages[0].content }}<|end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    rendered = tokenizer.render([{"role": "user", "content": "sky"}], add_generation_prompt=False)
    [tokens] = tokenizer.encode([rendered], special_tokens=True)
    assert tokens[0] != 1 and tokens[-1] == tokenizer.eos_id == 900
    assert tokenizer.vocab_size == 901


def test_it_travels_to_workers(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(["The sky"], special_tokens=True) == tokenizer.encode(
        ["The sky"], special_tokens=True
    )
    assert again.identity == tokenizer.identity


def test_template_and_vocabulary_have_identities_of_their_own(unigram_model: Path) -> None:
    model_bytes = unigram_model.read_bytes()
    one, other = (SentencePieceTokenizer(model_bytes, template) for template in ("1", "2"))
    assert one.template_identity != other.template_identity
    assert one.vocabulary_identity == other.vocabulary_identity
    without_bos = SentencePieceTokenizer(model_bytes, "1", {"add_bos_token": False})
    assert without_bos.vocabulary_identity != one.vocabulary_identity


def test_a_file_that_is_no_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model at all")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "x.model"))

"""Tokenizers: loading, identities, and sentencepiece models against the library itself."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from megatron_idpo.data.sources.preferences import Preference
from megatron_idpo.data.tokenize.chat import TokenPair, encode_pairs
from megatron_idpo.data.tokenize.rendering import pair_text
from megatron_idpo.data.tokenize.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_idpo.errors import DataError

HELLO = [{"role": "user", "content": "hello"}]


def test_template_from_text_or_file(text_tokenizer_path: str, tmp_path: Path) -> None:
    assert not load_tokenizer(text_tokenizer_path).has_chat_template
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}!")
    for template in (str(file), file.read_text()):
        tokenizer = load_tokenizer(text_tokenizer_path, template)
        assert tokenizer.render(HELLO, add_generation_prompt=False) == "hello!"


def test_identity_depends_on_the_template_and_can_be_pickled(
    text_tokenizer: Tokenizer, chat_tokenizer: Tokenizer, text_tokenizer_path: str
) -> None:
    assert text_tokenizer.identity != chat_tokenizer.identity
    assert load_tokenizer(text_tokenizer_path).identity == text_tokenizer.identity
    again = pickle.loads(pickle.dumps(chat_tokenizer))
    assert again.identity == chat_tokenizer.identity
    assert again.encode(["hello"], special_tokens=True) == chat_tokenizer.encode(
        ["hello"], special_tokens=True
    )


def test_identity_ignores_padding_and_truncation(text_tokenizer_path: str, tmp_path: Path) -> None:
    """TRL adds a padding token and saves it; the tokens of a text do not change."""
    from transformers import AutoTokenizer

    identity = load_tokenizer(text_tokenizer_path).vocabulary_identity
    loaded = AutoTokenizer.from_pretrained(text_tokenizer_path)
    loaded.pad_token = loaded.eos_token
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding()
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocabulary_identity == identity
    loaded.add_tokens(["added"])
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocabulary_identity != identity


def test_control_tokens(chat_tokenizer: Tokenizer) -> None:
    assert chat_tokenizer.special_ids >= {0, 1, 2, 3}
    assert chat_tokenizer.decode([3]) == "<|im_end|>"


def test_truncation_in_tokenizer_json_is_ignored(text_tokenizer_path: str, tmp_path: Path) -> None:
    """It would truncate pairs without counting them."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(text_tokenizer_path)
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.save_pretrained(tmp_path)
    [tokens] = load_tokenizer(str(tmp_path)).encode(["xyz " * 20], special_tokens=False)
    assert len(tokens) > 4


@pytest.mark.parametrize(
    ("path", "template", "message"),
    [
        (
            "no/such/place/anywhere",
            None,
            "no/such/place/anywhere: is not a directory; name a model",
        ),
        ("missing.model", None, "missing.model: no such file"),
        (None, "{% for %}", "data.chat_template: the chat template has a syntax error in line 1"),
        (None, "missing.jinja", "cannot read 'missing.jinja'"),
    ],
)
def test_invalid_tokenizer_or_template_is_reported(
    text_tokenizer_path: str, path: str | None, template: str | None, message: str
) -> None:
    with pytest.raises(DataError) as error:
        load_tokenizer(path or text_tokenizer_path, template)
    assert message in str(error.value)


def test_byte_order_mark_of_a_template_file_is_not_written(
    text_tokenizer_path: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}", "utf-8-sig")
    tokenizer = load_tokenizer(text_tokenizer_path, str(file))
    assert (
        tokenizer.render([{"role": "user", "content": "hi"}], add_generation_prompt=False) == "hi"
    )


def test_template_that_fails_on_the_check_is_accepted(text_tokenizer_path: str) -> None:
    for template in ("{{ 1 / (messages | length - 1) }}", "{{ raise_exception('no') }}"):
        assert load_tokenizer(text_tokenizer_path, template).has_chat_template


def test_directory_with_only_a_model_file_is_sentencepiece(unigram_model: Path) -> None:
    assert isinstance(load_tokenizer(str(unigram_model)), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(str(unigram_model.parent)), SentencePieceTokenizer)


def test_template_and_vocabulary_have_separate_identities(text_tokenizer_path: str) -> None:
    plain = load_tokenizer(text_tokenizer_path)
    one, other = (load_tokenizer(text_tokenizer_path, f"{{{{ {n} }}}}") for n in (1, 2))
    assert len({tokenizer.template_identity for tokenizer in (plain, one, other)}) == 3
    assert len({tokenizer.vocabulary_identity for tokenizer in (plain, one, other)}) == 1


# ---- sentencepiece -------------------------------------------------------------------------------

LLAMA_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def sentencepiece(unigram_model: Path) -> Tokenizer:
    return load_tokenizer(str(unigram_model), LLAMA_TEMPLATE)


def test_sentencepiece_text_equals_the_library(
    sentencepiece: Tokenizer, unigram_model: Path
) -> None:
    library = SentencePieceProcessor(model_file=str(unigram_model))
    text = "The capital of France, é 漢!"
    bare = library.encode(text)
    assert sentencepiece.encode([text], special_tokens=False) == [bare]
    assert sentencepiece.encode([text], special_tokens=True) == [[library.bos_id(), *bare]]
    assert sentencepiece.decode([1, *bare, 2]) == f"<s>{text}</s>"


def test_sentencepiece_control_tokens_in_text(sentencepiece: Tokenizer) -> None:
    [tokens] = sentencepiece.encode(["<s>The</s><s>sky"], special_tokens=False)
    assert [token for token in tokens if token in (1, 2)] == [1, 2, 1]
    assert sentencepiece.eos_id == 2 and sentencepiece.decode([2]) == "</s>"
    assert sentencepiece.special_ids == {1, 2}


@settings(max_examples=25)
@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_sentencepiece_chat_decodes_to_its_text(
    sentencepiece: Tokenizer, question: str, chosen: str, rejected: str
) -> None:
    is_blank = not chosen.strip() or not rejected.strip()
    if chosen == rejected or is_blank or "\0" in question + chosen + rejected:
        return
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    text = pair_text(Preference([{"role": "user", "content": question}], *answers), sentencepiece)
    [pair] = encode_pairs([text], sentencepiece)
    assert isinstance(pair, TokenPair) and "unterminated" not in pair.notes
    # The model adds one space before every piece of text, and decoding removes it.
    assert sentencepiece.decode(pair.prompt + pair.chosen) == text.chosen
    assert pair.chosen[-1] == pair.rejected[-1] == 2


def test_sentencepiece_reads_tokenizer_config(unigram_model: Path, tmp_path: Path) -> None:
    shutil.copy(unigram_model, tmp_path / "tokenizer.model")
    config = {
        "add_bos_token": False,
        "eos_token": {"content": "<|end|>"},
        "added_tokens_decoder": {"900": {"content": "<|end|>"}},
        "chat_template": "{{ messages[0].content }}<|end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    sentencepiece = load_tokenizer(str(tmp_path))
    rendered = sentencepiece.render(
        [{"role": "user", "content": "sky"}], add_generation_prompt=False
    )
    [tokens] = sentencepiece.encode([rendered], special_tokens=True)
    assert tokens[0] != 1 and tokens[-1] == sentencepiece.eos_id == 900


def test_sentencepiece_can_be_pickled(sentencepiece: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(sentencepiece))
    assert again.encode(["The sky"], special_tokens=True) == sentencepiece.encode(
        ["The sky"], special_tokens=True
    )
    assert again.identity == sentencepiece.identity


def test_sentencepiece_has_separate_identities(unigram_model: Path) -> None:
    model_bytes = unigram_model.read_bytes()
    one, other = (SentencePieceTokenizer(model_bytes, template) for template in ("1", "2"))
    assert one.template_identity != other.template_identity
    assert one.vocabulary_identity == other.vocabulary_identity
    without_bos = SentencePieceTokenizer(model_bytes, "1", {"add_bos_token": False})
    assert without_bos.vocabulary_identity != one.vocabulary_identity


def test_invalid_sentencepiece_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_templates_cannot_reach_python(text_tokenizer_path, tmp_path):
    ran = tmp_path / "ran"
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {ran}') }}}}"
    tokenizer = load_tokenizer(text_tokenizer_path, template)
    with pytest.raises(Exception, match="__init__"):
        tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert not ran.exists()

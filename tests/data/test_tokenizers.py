"""Loading tokenizers."""

import pickle
from pathlib import Path

import pytest

from megatron_idpo.data.tokenize.sentencepiece import SentencePieceTokenizer
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import DataError

HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_comes_from_text_or_file(text_tokenizer_path: str, tmp_path: Path) -> None:
    assert not load_tokenizer(text_tokenizer_path).has_chat_template
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}!")
    for template in (str(file), file.read_text()):
        tokenizer = load_tokenizer(text_tokenizer_path, template)
        assert tokenizer.render(HELLO, add_generation_prompt=False) == "hello!"


def test_identity_changes_with_the_template_and_survives_a_pickle(
    text_tokenizer: Tokenizer, chat_tokenizer: Tokenizer, text_tokenizer_path: str
) -> None:
    assert text_tokenizer.identity != chat_tokenizer.identity
    assert load_tokenizer(text_tokenizer_path).identity == text_tokenizer.identity
    again = pickle.loads(pickle.dumps(chat_tokenizer))
    assert again.identity == chat_tokenizer.identity
    assert again.encode(["hello"], special_tokens=True) == chat_tokenizer.encode(
        ["hello"], special_tokens=True
    )


def test_how_batches_are_padded_and_cut_is_no_part_of_it(
    text_tokenizer_path: str, tmp_path: Path
) -> None:
    """TRL gives many a model a padding token, and then saves it: the tokens of a text stay."""
    from transformers import AutoTokenizer

    identity = load_tokenizer(text_tokenizer_path).vocabulary_identity
    loaded = AutoTokenizer.from_pretrained(text_tokenizer_path)
    loaded.pad_token = loaded.eos_token
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding()
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocabulary_identity == identity
    loaded.add_tokens(["a new word"])
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocabulary_identity != identity


def test_control_tokens_are_known(chat_tokenizer: Tokenizer) -> None:
    assert chat_tokenizer.special_ids >= {0, 1, 2, 3}
    assert chat_tokenizer.decode([3]) == "<|im_end|>"
    assert chat_tokenizer.vocab_size > 256


def test_the_length_a_tokenizer_file_asks_for_is_not_obeyed(
    text_tokenizer_path: str, tmp_path: Path
) -> None:
    """A tokenizer.json with truncation switched on must not cut pairs behind our back."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(text_tokenizer_path)
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.save_pretrained(tmp_path)
    [tokens] = load_tokenizer(str(tmp_path)).encode(["xyz " * 20], special_tokens=False)
    assert len(tokens) > 4


@pytest.mark.parametrize(
    ("path", "template", "message"),
    [
        ("no/such/place/anywhere", None, "no tokenizer can be loaded"),
        ("missing.model", None, "missing.model: no such file"),
        (None, "{% for %}", "data.chat_template: the chat template has a syntax error in line 1"),
        (None, "missing.jinja", "cannot read 'missing.jinja'"),
    ],
)
def test_what_cannot_be_loaded_is_reported(
    text_tokenizer_path: str, path: str | None, template: str | None, message: str
) -> None:
    with pytest.raises(DataError) as error:
        load_tokenizer(path or text_tokenizer_path, template)
    assert message in str(error.value)


def test_a_template_that_cannot_write_a_greeting_is_left_to_the_rows(
    text_tokenizer_path: str,
) -> None:
    for template in ("{{ 1 / (messages | length - 1) }}", "{{ raise_exception('no') }}"):
        assert load_tokenizer(text_tokenizer_path, template).has_chat_template


def test_a_directory_with_only_a_model_file_is_sentencepiece(unigram_model: Path) -> None:
    assert isinstance(load_tokenizer(str(unigram_model)), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(str(unigram_model.parent)), SentencePieceTokenizer)


def test_template_and_vocabulary_have_identities_of_their_own(text_tokenizer_path: str) -> None:
    plain = load_tokenizer(text_tokenizer_path)
    one, other = (load_tokenizer(text_tokenizer_path, f"{{{{ {n} }}}}") for n in (1, 2))
    assert len({tokenizer.template_identity for tokenizer in (plain, one, other)}) == 3
    assert len({tokenizer.vocabulary_identity for tokenizer in (plain, one, other)}) == 1

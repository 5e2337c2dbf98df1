"""The tokens that end the answers of training data."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_idpo.data.sources.preferences import Preference
from megatron_idpo.data.sources.record import BadRecord
from megatron_idpo.data.tokenize.answer_end import answer_end
from megatron_idpo.data.tokenize.chat import TokenPair, encode_pairs, is_unterminated
from megatron_idpo.data.tokenize.rendering import pair_text
from megatron_idpo.data.tokenize.tokenizers import HfTokenizer, Tokenizer, load_tokenizer

EOS, TURN_END = 1, 3


@pytest.mark.parametrize(
    ("template", "turn_end"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}", TURN_END),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),  # writes no token
        # A token before the answer, or at the start of the next turn, does not end it.
        ("{% for m in messages %}<|im_start|>{{ m.content }}</s><s>{% endfor %}", EOS),
        # Needs a system message.
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            TURN_END,
        ),
        ("{{ raise_exception('always') }}", None),
    ],
)
def test_the_turn_end_is_what_the_template_writes(
    text_tokenizer_path: str, template: str, turn_end: int | None
) -> None:
    end = answer_end(load_tokenizer(text_tokenizer_path, template))
    assert (end.eos, end.turn_end) == (EOS, turn_end)
    assert end.tokens == ([EOS] if turn_end in (None, EOS) else [EOS, turn_end])


def test_it_ends_trained_answers(chat_tokenizer: Tokenizer) -> None:
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    text = pair_text(Preference([{"role": "user", "content": "Why?"}], *answers), chat_tokenizer)
    [pair] = encode_pairs([text], chat_tokenizer)
    assert isinstance(pair, TokenPair)
    special = [token for token in pair.chosen if token in chat_tokenizer.special_ids]
    assert special == [answer_end(chat_tokenizer).turn_end]


def test_without_a_template_answers_end_with_eos(text_tokenizer: Tokenizer) -> None:
    end = answer_end(text_tokenizer)
    assert (end.tokens, end.turn_end, end.written) == ([EOS], None, "")


def test_an_added_token_that_is_not_special_ends_answers(text_tokenizer_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_tokenizer_path)
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    assert answer_end(HfTokenizer(tokenizer)).turn_end_text == "<end>"


def test_white_space_that_was_added_does_not_end_answers(text_tokenizer_path: str) -> None:
    """GPT-NeoX and Phi have tokens for runs of spaces; generation would stop at the first."""
    tokenizer = AutoTokenizer.from_pretrained(text_tokenizer_path)
    tokenizer.add_tokens([AddedToken("  ", special=False, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}  \n{% endfor %}"
    assert answer_end(HfTokenizer(tokenizer)).turn_end is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}  \n</s>{% endfor %}"
    assert answer_end(HfTokenizer(tokenizer)).turn_end == EOS


@pytest.fixture
def added_end(text_tokenizer_path: str) -> Tokenizer:
    """ChatML whose end of turn was added to the vocabulary without being marked as special."""
    tokenizer = AutoTokenizer.from_pretrained(text_tokenizer_path)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<end>", "<call>")])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    return HfTokenizer(tokenizer)


def encoded(tokenizer: Tokenizer, chosen: str, prompt: str = "Why?") -> TokenPair | BadRecord:
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, "No.")]
    text = pair_text(Preference([{"role": "user", "content": prompt}], *answers), tokenizer)
    return encode_pairs([text], tokenizer)[0]


def test_it_is_a_control_token_like_a_special_one(added_end: Tokenizer) -> None:
    for chosen, prompt, notes in (
        ("Yes.", "Why?", {}),
        ("<call>", "Why?", {}),  # other added tokens are text
        ("Yes.", "What is <end>?", {"control": "'<end>'"}),
    ):
        pair = encoded(added_end, chosen, prompt)
        assert isinstance(pair, TokenPair) and pair.notes == notes
    empty = encoded(added_end, "<end>")
    assert isinstance(empty, BadRecord) and "nothing but control tokens" in empty.reason


def test_other_added_tokens_do_not_end_answers(added_end: Tokenizer) -> None:
    pair = encoded(added_end, "<call>")
    assert isinstance(pair, TokenPair)
    call = next(token for token in pair.chosen if added_end.decode([token]) == "<call>")
    assert is_unterminated([call], added_end)
    assert not is_unterminated(pair.chosen, added_end)

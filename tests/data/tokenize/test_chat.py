"""Tokenizing: exact tokens, prompts are shared prefixes, `max_length` as in TRL."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.sources.preferences import Preference
from megatron_idpo.data.sources.record import BadRecord
from megatron_idpo.data.tokenize.chat import DroppedPair, TokenPair, encode_pairs, truncate
from megatron_idpo.data.tokenize.rendering import pair_text
from megatron_idpo.data.tokenize.tokenizers import HfTokenizer, Tokenizer, load_tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def tokens_of(preference: Preference, tokenizer: Tokenizer) -> TokenPair:
    [pair] = encode_pairs([pair_text(preference, tokenizer)], tokenizer)
    if isinstance(pair, BadRecord):
        raise pair
    return pair


def test_chat_answer_is_the_text_after_the_prompt(chat_tokenizer: Tokenizer) -> None:
    pair = tokens_of(Preference([USER], reply("Paris."), reply("No.")), chat_tokenizer)
    assert chat_tokenizer.decode(pair.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chat_tokenizer.decode(pair.chosen) == "Paris.<|im_end|>\n"
    assert chat_tokenizer.decode(pair.rejected) == "No.<|im_end|>\n"
    assert not pair.notes


def test_text_ends_with_one_eos(text_tokenizer: Tokenizer) -> None:
    pair = tokens_of(Preference("The sky", " is blue.", " is green.</s>"), text_tokenizer)
    eos = text_tokenizer.eos_id
    assert pair.prompt[0] == 0  # BOS
    assert [ids.count(eos) for ids in (pair.prompt, pair.chosen, pair.rejected)] == [0, 1, 1]
    assert pair.chosen[-1] == pair.rejected[-1] == eos


def test_merge_across_the_boundary_moves_it_for_both_answers(text_tokenizer: Tokenizer) -> None:
    """'The capital of Fra' + 'nce' has other tokens than its two halves."""
    texts = ("The capital of Fra", "nce is Paris.", "!")
    pair = tokens_of(Preference(*texts), text_tokenizer)
    alone, whole = text_tokenizer.encode([texts[0], texts[0] + texts[1]], special_tokens=True)
    assert whole[: len(alone)] != alone and "tokens merged" in pair.notes  # Precondition.
    assert pair.prompt == alone[: len(pair.prompt)]
    assert pair.prompt + pair.chosen == [*whole, text_tokenizer.eos_id]
    assert text_tokenizer.decode(pair.prompt + pair.rejected) == "<s>The capital of Fra!</s>"


def test_merge_that_absorbs_the_whole_prompt_is_undone(bare_tokenizer: Tokenizer) -> None:
    [merged] = bare_tokenizer.encode(["Th"], special_tokens=False)
    assert len(merged) == 1  # Precondition.
    pair = tokens_of(Preference("T", "h", "o"), bare_tokenizer)
    assert [bare_tokenizer.decode(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
        "T",
        "h</s>",
        "o</s>",
    ]
    assert "tokens merged" in pair.notes


def test_bos_that_is_also_the_eos_begins_an_empty_prompt(text_tokenizer_path: str) -> None:
    """As in OPT: it is not an EOS that the tokenizer wrote after the prompt."""
    from transformers import AutoTokenizer

    tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(text_tokenizer_path, eos_token="<s>"))
    pair = tokens_of(Preference("", "a", "b"), tokenizer)
    assert tokenizer.decode(pair.prompt + pair.chosen) == "<s>a<s>"
    assert len(pair.prompt) == 1 and not pair.notes


def test_pair_without_a_token_before_the_answers_is_refused(bare_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRecord, match="no token stands before"):
        tokens_of(Preference("", "a", "b"), bare_tokenizer)


ANY_TEXT = st.text(max_size=12) | st.text("Th e sky is\n", max_size=12)


@settings(max_examples=40)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_text_pair_has_exactly_the_tokens_of_its_text(
    text_tokenizer: Tokenizer, prompt: str, chosen: str, rejected: str
) -> None:
    """For every pair of different answers; the prompt's tokens are shared."""
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return
    pair = tokens_of(Preference(prompt, chosen, rejected), text_tokenizer)
    alone, *whole = text_tokenizer.encode(
        [prompt, prompt + chosen, prompt + rejected], special_tokens=True
    )
    assert pair.prompt == alone[: len(pair.prompt)] and pair.prompt
    for answer, expected in zip((pair.chosen, pair.rejected), whole, strict=True):
        assert pair.prompt + answer == [*expected, text_tokenizer.eos_id]
    assert text_tokenizer.decode(pair.prompt + pair.chosen) == f"<s>{prompt}{chosen}</s>"
    kept_of_prompt = len(text_tokenizer.decode(pair.prompt))
    assert kept_of_prompt <= len(f"<s>{prompt}")


@settings(max_examples=25)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), ANY_TEXT, ANY_TEXT)
def test_chat_has_exactly_the_tokens_of_its_text(
    chat_tokenizer: Tokenizer, turns: list[str], chosen: str, rejected: str
) -> None:
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return
    roles = ["user", "assistant"] * 3
    turns = turns if len(turns) % 2 else turns[:-1]
    prompt = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    pair = tokens_of(Preference(prompt, reply(chosen), reply(rejected)), chat_tokenizer)
    for answer, tokens in ((chosen, pair.chosen), (rejected, pair.rejected)):
        text = chat_tokenizer.render([*prompt, *reply(answer)], add_generation_prompt=False)
        assert chat_tokenizer.encode([text], special_tokens=False) == [pair.prompt + tokens]
        assert chat_tokenizer.decode(pair.prompt + tokens) == text
    header = chat_tokenizer.render(prompt, add_generation_prompt=False)
    assert chat_tokenizer.decode(pair.prompt).startswith(header)


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def test_generation_prompt_that_finished_turns_lack_moves_the_boundary(
    text_tokenizer_path: str,
) -> None:
    """A template that opens with a thought, but omits it in finished turns."""
    template = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    tokenizer = load_tokenizer(text_tokenizer_path, template)
    pair = tokens_of(Preference([USER], reply("Paris"), reply("<No>")), tokenizer)
    assert pair.notes == {"opening": repr("<think>")}
    assert tokenizer.decode(pair.prompt).endswith("assistant\n")
    assert tokenizer.decode(pair.chosen) == "Paris<|im_end|>"


def test_template_that_rewrites_the_prompt_is_refused(text_tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path, "{{ messages | length }}" + TURNS)
    with pytest.raises(BadRecord, match="writes the prompt differently"):
        tokens_of(Preference([USER], reply("a"), reply("b")), tokenizer)


def test_template_without_answers_is_refused(text_tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path, "{{ messages[0].content }}")
    with pytest.raises(BadRecord, match="writes nothing of 'chosen'"):
        tokens_of(Preference([USER], reply("a"), reply("b")), tokenizer)


def test_error_of_a_template_is_reported(text_tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path, "{{ raise_exception('no system turn') }}")
    with pytest.raises(BadRecord, match=r"chat template fails: .*no system turn"):
        tokens_of(Preference([USER], reply("a"), reply("b")), tokenizer)


def test_template_without_end_of_turn_is_counted(text_tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path, TURNS.replace("<|im_end|>", " \n"))
    assert "unterminated" in tokens_of(Preference([USER], reply("a"), reply("b")), tokenizer).notes


def test_tools_and_both_template_kwargs_reach_the_template(text_tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path, "{{ tools[0].n }}{{ k }}{{ j }}" + TURNS)
    preference = Preference([USER], reply("a"), reply("b"), [{"n": "<f>"}], {"k": "record"})
    text = pair_text(preference, tokenizer, {"k": "config", "j": "config"})
    assert text.prompt.startswith("<f>recordconfig")


def test_lone_surrogate_is_refused(text_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRecord, match="lone surrogate"):
        pair_text(Preference("q", "\ud800", "b"), text_tokenizer)


def test_eos_that_the_tokenizer_appends_is_removed_from_the_prompt() -> None:
    class Ending(HfTokenizer):
        """Characters as tokens, with BOS and EOS."""

        eos_id, has_chat_template = 1, False
        special_ids, eos_text, control_texts = frozenset({0, 1}), "", re.compile("<s>")

        def __init__(self) -> None:
            pass

        def encode(self, texts: Any, *, special_tokens: bool) -> list[list[int]]:
            return [[0, *map(ord, text), 1] for text in texts]

        def decode(self, tokens: Any) -> str:
            return "".join(map(chr, tokens))

    pair = tokens_of(Preference("q", "a", "b"), Ending())
    assert (pair.prompt, pair.chosen, pair.rejected) == ([0, 113], [97, 1], [98, 1])
    assert not pair.notes


PAIR = TokenPair(prompt=[1, 2, 3], chosen=[4, 5, 6, 9], rejected=[4, 7, 9])


def test_keep_start_truncates_each_answer_without_eos() -> None:
    truncated = truncate(PAIR, 6, "keep_start")
    assert isinstance(truncated, TokenPair) and truncated.truncated
    assert (truncated.prompt, truncated.chosen, truncated.rejected) == (
        [1, 2, 3],
        [4, 5, 6],
        [4, 7, 9],
    )


def test_short_pairs_are_unchanged() -> None:
    assert truncate(PAIR, 7, "keep_start") is PAIR
    assert truncate(PAIR, None, "error") is PAIR


@pytest.mark.parametrize(
    ("max_length", "truncation", "reason"),
    [
        (3, "keep_start", "the prompt fills max_length"),
        (4, "keep_start", "both answers are the same when truncated at max_length"),
        (6, "drop", "longer than max_length"),
    ],
)
def test_dropped_pair_has_its_reason(max_length: int, truncation: Any, reason: str) -> None:
    assert truncate(PAIR, max_length, truncation) == DroppedPair(reason)


def test_truncation_error_names_the_required_length() -> None:
    with pytest.raises(BadRecord, match="has 7 tokens, more than max_length 6"):
        truncate(PAIR, 6, "error")

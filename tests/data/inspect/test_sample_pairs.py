"""Printed pairs: which ones, all of their tokens, and no terminal control characters."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.inspect.sample_pairs import (
    END_TOKENS,
    START_TOKENS,
    part_text,
    print_pair,
    select_pairs,
    truncated_parts,
)
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import PairDataset, load_pairs
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture
def load(write_jsonl: Callable[..., str], tmp_path: Path) -> Callable[..., PairDataset]:
    def load_from(
        answers: list[tuple[Any, Any, Any]], tokenizer: Tokenizer, max_length: int | None = None
    ) -> PairDataset:
        names = ("prompt", "chosen", "rejected")
        path = write_jsonl([dict(zip(names, answer, strict=True)) for answer in answers])
        options = TokenOptions(max_length=max_length)
        return load_pairs([SourceConfig(path=path)], tokenizer, options, cache=tmp_path / "cache")

    return load_from


def words(count: int) -> str:
    """A text of `count` tokens that do not merge with each other or with text around them."""
    return "".join(chr(0x21 + at * 7 % 60) for at in range(count))


def texts(*lengths: tuple[int, int, int]) -> list[tuple[str, str, str]]:
    return [(words(p) + "#", "~" + words(c), "^" + words(r)) for p, c, r in lengths]


def selection(
    pairs: PairDataset,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    share_prompt: bool = True,
) -> list[tuple[int, str]]:
    selected = select_pairs(pairs, max_length, tokenizer, share_prompt=share_prompt)
    return list(selected.items())


def test_median_longest_and_shortest_are_selected(
    load: Callable[..., PairDataset], text_tokenizer: Tokenizer
) -> None:
    pairs = load(texts((9, 9, 9), (20, 20, 20), (3, 3, 3), (12, 12, 12), (8, 8, 8)), text_tokenizer)
    assert selection(pairs, text_tokenizer) == [
        (0, "The pair of median length"),
        (1, "The longest pair"),
        (2, "The shortest pair"),
    ]
    two = pairs.select(np.array([1, 2]))
    assert [index for index, _ in selection(two, text_tokenizer)] == [1, 0]
    one = pairs.select(np.array([3]))
    assert [index for index, _ in selection(one, text_tokenizer)] == [0]


def test_selection_uses_row_positions(
    load: Callable[..., PairDataset], text_tokenizer: Tokenizer
) -> None:
    """A long prompt counts twice if it is stored twice."""
    pairs = load(texts((30, 4, 4), (4, 20, 20), (2, 2, 2)), text_tokenizer)
    for share_prompt, longest in ((True, 1), (False, 0)):
        selected = selection(pairs, text_tokenizer, share_prompt=share_prompt)
        assert (longest, "The longest pair") in selected


def test_truncated_pair_is_selected(
    load: Callable[..., PairDataset], text_tokenizer: Tokenizer
) -> None:
    """Pair 1 has exactly max_length tokens and is not truncated; pair 3 is."""
    answers = texts((10, 5, 6), (10, 30, 6), (9, 26, 26), (30, 40, 2), (3, 5, 5), (3, 5, 6))
    max_length = int(load(answers, text_tokenizer).lengths_P3[1, :2].sum())
    pairs = load(answers, text_tokenizer, max_length)
    assert not truncated_parts(pairs[1], max_length, text_tokenizer)
    assert truncated_parts(pairs[3], max_length, text_tokenizer) == {"chosen"}
    assert selection(pairs, text_tokenizer, max_length)[1:] == [
        (2, "The longest pair"),
        (3, "A truncated pair"),
    ]
    # If the longest pair is the truncated one, the third is the shortest.
    fewer = pairs.select(np.array([0, 3, 4]))
    assert selection(fewer, text_tokenizer, max_length)[1:] == [
        (1, "The longest pair"),
        (2, "The shortest pair"),
    ]


def chat(text: str, *answers: str) -> tuple[Any, ...]:
    prompt = [{"role": "user", "content": text}]
    return (prompt, *([{"role": "assistant", "content": answer}] for answer in answers))


def test_chat_answer_without_end_of_turn_is_truncated(
    load: Callable[..., PairDataset], chat_tokenizer: Tokenizer
) -> None:
    """The line break after the end-of-turn token may be missing."""
    answers = [chat("Hi", "Yes.", "No."), chat("Hi", "Yes. Perhaps.", "No.")]
    full_length = int(load(answers, chat_tokenizer).lengths_P3[1, :2].sum())
    for missing_tokens, is_truncated in ((0, False), (1, False), (2, True), (3, True)):
        max_length = full_length - missing_tokens
        pairs = load(answers, chat_tokenizer, max_length)
        assert bool(truncated_parts(pairs[1], max_length, chat_tokenizer)) is is_truncated
        assert not truncated_parts(pairs[0], max_length, chat_tokenizer)


def shown(tokens: list[int], tokenizer: Tokenizer, **options: Any) -> str:
    return part_text(tokens, tokenizer, **options).plain


def test_control_tokens_are_distinguished_from_text(chat_tokenizer: Tokenizer) -> None:
    start = chat_tokenizer.encode(["<|im_start|>"], special_tokens=False)[0]
    like = [t for c in "<|im_start|>" for t in chat_tokenizer.encode([c], special_tokens=False)[0]]
    tokens = [*start, *start, *like]
    assert shown(tokens, chat_tokenizer) == "<|im_start|>" * 3
    assert (
        shown(tokens, chat_tokenizer, mark_control=True)
        == "⟦<|im_start|>⟧⟦<|im_start|>⟧<|im_start|>"
    )
    spans = part_text(tokens, chat_tokenizer).spans
    assert [(span.start, span.end) for span in spans if span.style == "reverse"] == [
        (0, 12),
        (12, 24),
    ]


def without_pictures(text: str) -> str:
    """The text before line breaks and control characters were replaced."""
    for code in (*(c for c in range(32) if c not in (9, 10)), 0x7F):
        picture = chr(0x2421) if code == 0x7F else chr(0x2400 + code)
        text = text.replace(picture, chr(code))
    return text.replace("↵\n", "\n")


PLAIN = st.text(
    st.characters(codec="utf-8", exclude_characters="↵⟦⟧", max_codepoint=0x7F)
    | st.sampled_from("äé😀中\n\t\x1b\x00"),
    max_size=40,
)


@settings(max_examples=40)
@given(prompt=PLAIN, answer=PLAIN)
def test_prompt_and_answer_decode_to_the_text(
    text_tokenizer_path: str, prompt: str, answer: str
) -> None:
    tokenizer = load_tokenizer(text_tokenizer_path)
    first, second = (tokenizer.encode([t], special_tokens=False)[0] for t in (prompt, answer))
    text = shown(first, tokenizer) + shown(second, tokenizer, before=first)
    assert without_pictures(text) == tokenizer.decode([*first, *second])
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in text)


def test_sentencepiece_answer_keeps_its_first_space(unigram_model: Path) -> None:
    """Its decoder drops the first space of a text, but an answer is not the start of one."""
    tokenizer = load_tokenizer(str(unigram_model))
    whole = tokenizer.encode(["The sky is blue today"], special_tokens=False)[0]
    parts = (whole[:at] for at in range(1, len(whole)))
    for prompt in parts:
        answer = shown(whole[len(prompt) :], tokenizer, before=prompt)
        assert shown(prompt, tokenizer) + answer == tokenizer.decode(whole)


def test_middle_of_a_long_part_is_left_out(text_tokenizer: Tokenizer) -> None:
    tokens = text_tokenizer.encode([words(3000)], special_tokens=False)[0]
    start, message, end = shown(tokens, text_tokenizer).split("\n")
    assert message == f"⋯ {len(tokens) - START_TOKENS - END_TOKENS:,} tokens not shown ⋯"
    assert start == text_tokenizer.decode(tokens[:START_TOKENS])
    assert end == text_tokenizer.decode(tokens[-END_TOKENS:])
    # Incomplete characters next to the gap are removed.
    halves = text_tokenizer.encode(["😀" * 400], special_tokens=False)[0]
    assert len(halves) == 4 * 400, "four tokens each"
    for shift in range(4):
        start = shown(halves[shift:], text_tokenizer).split("\n")[0]
        assert start.endswith("😀")


def test_printed_pair(load: Callable[..., PairDataset], text_tokenizer: Tokenizer) -> None:
    pairs = load([("Why?\n[b]\x1b[2J", " Yes." * 30, " No.")], text_tokenizer, 40)
    prompt, chosen, rejected = (f"{length:,} tokens" for length in pairs.lengths_P3[0])

    def printed(**options: Any) -> list[str]:
        file = io.StringIO()
        console = Console(file=file, width=60, **options)
        print_pair(console, pairs, 0, 40, text_tokenizer, title="Any pair")
        return file.getvalue().splitlines()

    plain = printed()
    assert plain[0].startswith("Any pair ───")
    assert "".join(plain).count("pairs.jsonl:1") == 1
    location = plain.index(f"prompt  {prompt}, not scored")
    assert plain[location + 1 : location + 3] == ["  ⟦<s>⟧Why?↵", "  [b]␛[2J"]
    assert f"chosen  {chosen}, scored" in plain
    end = plain.index(f"rejected  {rejected}, scored")
    assert plain[end - 1] == "  ✂ truncated at max_length"
    assert plain[end + 1 :] == ["  No.⟦</s>⟧".replace("  No", "   No"), ""]
    assert all(len(line) <= 60 for line in plain)

    colored = printed(force_terminal=True, color_system="standard", no_color=False)
    assert [Text.from_ansi(line).plain.replace("─", "") for line in colored] == [
        line.replace("⟦", "").replace("⟧", "").replace("─", "") for line in plain
    ]
    together = "\n".join(colored)
    assert "\x1b[7;32m</s>" not in together, "the chosen answer is truncated"
    assert "\x1b[7;31m</s>" in together and "\x1b[2;7m<s>" in together
    assert "\x1b[2J" not in together


def test_last_line_break_of_a_template_leaves_no_empty_line(
    load: Callable[..., PairDataset], chat_tokenizer: Tokenizer
) -> None:
    pairs = load([chat("Hi", "Yes.", "No.")], chat_tokenizer)
    file = io.StringIO()
    print_pair(Console(file=file, width=60), pairs, 0, None, chat_tokenizer, title="Any")
    *lines, last = file.getvalue().splitlines()
    assert all(line.strip() for line in lines) and last == ""
    assert lines[-1] == "  No.⟦<|im_end|>⟧↵"

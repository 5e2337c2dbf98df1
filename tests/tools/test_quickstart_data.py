"""The quickstart's preference pairs: format, balanced lengths, no duplicates.

A model can lower the loss with any feature that separates chosen from rejected, so two trivial ones
are bounded here: the length, and the first words of an answer. `examples/data/README.md` says what
the data is suited for.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.data.sources.preferences import parse_preference
from megatron_idpo.data.sources.readers import read_file

DATA = Path(__file__).parents[2] / "examples" / "data"
FILES = ("quickstart_train.jsonl", "quickstart_held_out.jsonl")

MIN_TRAIN_PAIRS = 210
HELD_OUT_PAIRS = 40
ANSWER_WORDS = range(25, 71)
MAX_MEAN_DIFFERENCE = 0.10
"""Of the mean lengths, relative to chosen."""

MAX_LENGTH_ACCURACY = 0.60
"""Of the best classifier that sees only lengths."""

MAX_SHARED_OPENING = 0.10
"""Share of the answers of one side that begin with the same two words."""

MAX_PROMPT_OVERLAP = 0.6
"""Jaccard index of two prompts' sets of words; near duplicates have more."""

FOREIGN_LETTERS = set("éèČ")
"""The only non-ASCII characters: French, Italian and a Czech name."""


@dataclass(frozen=True)
class TextPair:
    """A question and its two answers."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.prompt, self.chosen, self.rejected


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


@cache
def pairs(name: str) -> tuple[TextPair, ...]:
    return tuple(
        TextPair(*(record[field][0]["content"] for field in ("prompt", "chosen", "rejected")))
        for record in records(name)
    )


def words(text: str) -> int:
    return len(text.split())


def key_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(one: str, other: str) -> float:
    return len(key_words(one) & key_words(other)) / len(key_words(one) | key_words(other))


def longer_wins(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    """Accuracy of choosing the longer answer, or the shorter one."""
    both = zip(chosen, rejected, strict=True)
    longer = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in both)
    return max(longer, len(chosen) - longer) / len(chosen)


def best_cut(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    """Accuracy of the best rule `length >= cut`, or `<`, on single answers."""
    answers = len(chosen) + len(rejected)
    right = (
        sum(length >= cut for length in chosen) + sum(length < cut for length in rejected)
        for cut in {*chosen, *rejected}
    )
    return max(max(count, answers - count) for count in right) / answers


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_a_conversational_preference(name: str) -> None:
    for record in records(name):
        assert list(record) == ["prompt", "chosen", "rejected"]
        for field, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            assert [list(message) for message in record[field]] == [["role", "content"]]
            assert record[field][0]["role"] == role


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_parsed_as_chat(name: str) -> None:
    read = [parse_preference(row.record()) for row in read_file(DATA / name)]
    assert len(read) == len(pairs(name))
    assert all(preference.is_chat for preference in read)


def test_number_of_pairs_matches_the_readme() -> None:
    train, held_out = (len(pairs(name)) for name in FILES)
    assert train >= MIN_TRAIN_PAIRS
    assert held_out == HELD_OUT_PAIRS
    readme = (DATA / "README.md").read_text("utf-8")
    for name, count in zip(FILES, (train, held_out), strict=True):
        assert f"`{name}` | {count} |" in readme


def test_prompts_have_no_near_duplicates() -> None:
    prompts = [pair.prompt for name in FILES for pair in pairs(name)]
    near = [
        (one, other)
        for one, other in itertools.combinations(prompts, 2)
        if overlap(one, other) > MAX_PROMPT_OVERLAP
    ]
    assert near == []


def test_answers_have_no_duplicates() -> None:
    answers = Counter(
        " ".join(re.findall(r"\w+", text.lower()))
        for name in FILES
        for pair in pairs(name)
        for text in (pair.chosen, pair.rejected)
    )
    assert [text for text, count in answers.items() if count > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_answers_are_short_paragraphs(name: str) -> None:
    outliers = [
        (words(text), text)
        for pair in pairs(name)
        for text in (pair.chosen, pair.rejected)
        if words(text) not in ANSWER_WORDS
    ]
    assert outliers == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("measure", [words, len], ids=["words", "characters"])
def test_length_does_not_predict_the_better_answer(
    name: str, measure: Callable[[str], int]
) -> None:
    chosen = [measure(pair.chosen) for pair in pairs(name)]
    rejected = [measure(pair.rejected) for pair in pairs(name)]
    assert abs(sum(rejected) - sum(chosen)) <= MAX_MEAN_DIFFERENCE * sum(chosen)
    assert longer_wins(chosen, rejected) <= MAX_LENGTH_ACCURACY
    assert best_cut(chosen, rejected) <= MAX_LENGTH_ACCURACY


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_first_words_of_answers_vary(name: str, side: str) -> None:
    openings = Counter(
        " ".join(getattr(pair, side).lower().split()[:2]).strip(",.:;!?") for pair in pairs(name)
    )
    opening, count = openings.most_common(1)[0]
    assert count <= MAX_SHARED_OPENING * len(pairs(name)), opening


@pytest.mark.parametrize("name", FILES)
def test_texts_are_clean(name: str) -> None:
    for text in (text for pair in pairs(name) for text in pair.texts):
        assert text == " ".join(text.split()), text
        assert text == unicodedata.normalize("NFC", text), text
        assert {letter for letter in text if not " " <= letter <= "~"} <= FOREIGN_LETTERS, text
        assert text.count("`") % 2 == 0 and text.count('"') % 2 == 0, text


@pytest.mark.parametrize("name", FILES)
def test_files_are_utf8_lines_without_trailing_spaces(name: str) -> None:
    content = (DATA / name).read_bytes()
    assert content.endswith(b"}\n") and b"\r" not in content and b"\xef\xbb\xbf" not in content
    for line in content.decode("utf-8").split("\n")[:-1]:
        assert line.startswith("{") and line.endswith("}")


def test_length_rules_on_known_cases() -> None:
    assert longer_wins([1, 2, 3], [4, 5, 6]) == longer_wins([4, 5, 6], [1, 2, 3]) == 1
    assert longer_wins([1, 6], [2, 5]) == longer_wins([3, 3], [3, 3]) == 0.5
    assert best_cut([1, 2, 3], [4, 5, 6]) == best_cut([4, 5, 6], [1, 2, 3]) == 1
    assert best_cut([1, 4], [1, 4]) == 0.5

"""Records: interpreted as TRL interprets them, or refused with the reason."""

import json
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.data.sources.preferences import (
    common_prefix_length,
    implicit_prompt_length,
    parse_preference,
)
from megatron_idpo.data.sources.record import BadRecord, rename_columns


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_explicit_prompts_are_kept() -> None:
    text = parse_preference({**TEXT, "score": 3})
    assert (text.prompt, text.chosen, text.rejected, text.is_chat) == ("q", "a", "b", False)
    chat = parse_preference({**CHAT, "source": None})
    assert (chat.prompt, chat.chosen, chat.is_chat) == ([user("q")], [assistant("a")], True)


def test_implicit_prompt_is_the_common_prefix() -> None:
    text = parse_preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (text.prompt, text.chosen, text.rejected) == ("The sky is", " blue.", " green.")
    shared = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3")]
    chat = parse_preference(
        {"chosen": [*shared, assistant("x")], "rejected": [*shared, assistant("y")]}
    )
    assert (chat.prompt, chat.chosen, chat.rejected) == (shared, [assistant("x")], [assistant("y")])


def test_prompt_under_another_name_is_refused() -> None:
    """Otherwise answers would be trained without their prompt, as in TRL."""
    record = {"question": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(BadRecord, match="no field 'prompt', but 'question'"):
        parse_preference(record)
    assert parse_preference(record, format="text").prompt == ""
    assert parse_preference({**TEXT, "question": "q"}).prompt == "q"


def test_implicit_prompt_leaves_both_answers_non_empty() -> None:
    longer = parse_preference({"chosen": "abc", "rejected": "abcd"})
    assert (longer.prompt, longer.chosen, longer.rejected) == ("ab", "c", "cd")


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_implicit_prompt_follows_trl(chosen: str, rejected: str) -> None:
    """TRL's rule written as a loop, without its index before the start."""
    expected = 0
    for expected in range(min(len(chosen), len(rejected))):
        if chosen[expected] != rejected[expected]:
            if expected > 0 and chosen[expected - 1] == " ":
                expected -= 1
            break
    assert implicit_prompt_length(chosen, rejected) == expected


def test_text_prompt_with_whole_conversations() -> None:
    """The shape of UltraFeedback-binarized."""
    record = {"prompt": "q", "chosen": [user("q"), assistant("a")]}
    chat = parse_preference({**record, "rejected": [user("q"), assistant("b")]})
    assert (chat.prompt, chat.chosen) == ([user("q")], [assistant("a")])


def test_tools_and_template_kwargs_are_values_or_json() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given_tools in (tools, json.dumps(tools)):
        chat = parse_preference({**CHAT, "tools": given_tools, "chat_template_kwargs": {"k": 1}})
        assert (chat.tools, chat.template_kwargs) == (tools, {"k": 1})


def test_tool_turns_text_parts_and_null_fields() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}
    record = {
        "prompt": [parts, call, {"role": "tool", "content": "4"}],
        "chosen": [assistant("four")],
        "rejected": [call, {"role": "tool", "content": "5"}, assistant("five")],
    }
    chat = parse_preference(record)
    assert chat.prompt[0] == user("ab")
    assert chat.prompt[1] == {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert len(chat.rejected) == 3


HH = {
    "chosen": "\n\nHuman: hi\n\nthere \n\nAssistant: hello\n\nHuman: bye\n\nAssistant: good bye",
    "rejected": "\n\nHuman: hi\n\nthere \n\nAssistant: hello\n\nHuman: bye\n\nAssistant: no ",
}


def test_transcripts_become_messages_only_with_a_template() -> None:
    prompt = [user("hi\n\nthere"), assistant("hello"), user("bye")]
    for format in ("auto", "hh"):
        chat = parse_preference(HH, format=format)
        assert chat.prompt == prompt
        assert (chat.chosen, chat.rejected) == ([assistant("good bye")], [assistant("no")])
    text = parse_preference(HH, has_template=False)
    assert text.prompt.endswith("\n\nHuman: bye\n\nAssistant:") and text.chosen == " good bye"
    assert parse_preference(HH, format="text").prompt == text.prompt


def test_hh_prompt_is_prepended_to_bare_answers() -> None:
    record = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}
    assert parse_preference(record, format="hh").chosen == [assistant("a")]


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no object", ["x"], {}, "a list, not an object"),
    ("missing", {"prompt": "q", "chosen": "a"}, {}, "'rejected' is missing"),
    ("null", {**TEXT, "chosen": None}, {}, "'chosen' is missing"),
    ("number", {**TEXT, "chosen": 3}, {}, "'chosen' is 3, neither"),
    ("empty text", {**TEXT, "chosen": " \n"}, {}, "empty answer: 'chosen'"),
    ("empty list", {**CHAT, "rejected": []}, {}, "empty answer: 'rejected'"),
    ("empty message", {**CHAT, "rejected": [assistant("")]}, {}, "empty answer: 'rejected'"),
    ("equal text", {**TEXT, "rejected": "a"}, {}, "the same"),
    ("equal chat", {**CHAT, "rejected": [assistant("a")]}, {}, "the same"),
    ("answer by user", {**CHAT, "chosen": [user("a")]}, {}, "'chosen' begins with the role 'user'"),
    (
        "answer ends with user",
        {**CHAT, "chosen": [assistant("a"), user("b")]},
        {},
        "ends with the role 'user'",
    ),
    (
        "conversations differ at a user's turn",
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("x")]},
        {},
        "'chosen' begins with the role 'user'",
    ),
    ("unknown role", {**CHAT, "prompt": [{"role": "bot", "content": "x"}]}, {}, "role 'bot'"),
    ("no content", {**CHAT, "prompt": [{"role": "user"}]}, {}, "content null"),
    (
        "image",
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {},
        "part that is not text",
    ),
    ("text in list", {**CHAT, "chosen": ["a"]}, {}, "message 1 of 'chosen' is text"),
    ("mixed answers", {**TEXT, "rejected": CHAT["rejected"]}, {}, "chosen and rejected is text"),
    (
        "text prompt of another conversation",
        {**CHAT, "prompt": "q", "chosen": [user("r"), assistant("a")]},
        {},
        "do not begin with it",
    ),
    ("chat for text", CHAT, {"format": "text"}, "list of messages where text is needed"),
    ("text for chat", TEXT, {"format": "chat"}, "text where a list of messages is needed"),
    ("no template", CHAT, {"has_template": False}, "no chat template"),
    ("not hh", TEXT, {"format": "hh"}, "does not begin with"),
    ("half hh", {**HH, "rejected": "\n\nHuman: hi"}, {}, "only 'chosen' is a transcript"),
    ("chat for hh", CHAT, {"format": "hh"}, "not a transcript"),
    ("tools not json", {**CHAT, "tools": "{"}, {}, "'tools' is text, but not JSON"),
    ("tools not a list", {**CHAT, "tools": {"a": 1}}, {}, "'tools' is an object"),
]


@pytest.mark.parametrize(
    ("record", "options", "reason"), [pytest.param(*b[1:], id=b[0]) for b in BAD]
)
def test_invalid_record_is_refused_with_its_reason(
    record: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRecord) as error:
        parse_preference(record, **options)
    assert reason in f"{error.value.reason}; {error.value.remedy}"


FIELDS = ("prompt", "chosen", "rejected", "tools", "system", "history", "messages", "conversations")
FIELDS += ("input", "preferred_output", "non_preferred_output", "rejected_response", "question")
KEYS = ("role", "content", "from", "value", "tool_calls", "function_call", "messages", "text")
TEXTS = st.sampled_from(["user", "assistant", "gpt", "function_call", "{}", '[{"role": "', " "])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
        | inner.map(json.dumps)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON),
    st.sampled_from(["auto", "text", "chat", "hh", "single_turn"]),
    st.booleans(),
)
def test_any_json_is_a_pair_or_refused_with_a_reason(
    record: Any, format: Any, has_template: bool
) -> None:
    try:
        renamed = rename_columns(record, {})
        preference = parse_preference(renamed, format=format, has_template=has_template)
    except BadRecord as error:
        assert error.reason
    else:
        assert preference.chosen and preference.rejected
        assert preference.chosen != preference.rejected


def test_transcript_turns_become_stripped_messages() -> None:
    start = "\n\nHuman: a\n\nb: c \n\nAssistant:  d\n\nHuman:e\n\nAssistant: "
    chat = parse_preference({"chosen": start + "f Human: g\n", "rejected": start + "h"})
    assert [*chat.prompt, *chat.chosen] == [
        user("a\n\nb: c"),
        assistant("d"),
        user("e"),
        assistant("f Human: g"),
    ]


@pytest.mark.parametrize("text", ["Human: a\n\nAssistant: b", "\n\nHuman: a"])
def test_text_without_turn_marks_stays_text(text: str) -> None:
    assert not parse_preference({"prompt": "q", "chosen": text, "rejected": "b"}).is_chat


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=3))
def test_common_prefix_length(texts: list[str]) -> None:
    equal_columns = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    expected = len(list(equal_columns))
    assert common_prefix_length(*texts) == expected
    assert common_prefix_length(*map(list, texts)) == expected


@pytest.mark.parametrize("system", [None, "", " \n", "Be brief."])
def test_single_turn_equals_the_same_messages(system: str | None) -> None:
    chat = parse_preference({**TEXT, "system": system}, format="single_turn")
    first = [{"role": "system", "content": system}] if system and system.strip() else []
    assert chat == parse_preference({**CHAT, "prompt": [*first, *CHAT["prompt"]]})
    assert chat.is_chat


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"prompt": None, "question": "q"}, "no field 'prompt', but 'question'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": CHAT["prompt"]}, "'prompt' is a list, not text"),
        ({"chosen": CHAT["chosen"]}, "'chosen' is a list, not text"),
        ({"prompt": "", "question": "q"}, "no field 'prompt', but 'question'"),
        ({"system": ["s"]}, "'system' is a list, not text"),
        ({"system": []}, "'system' is a list, not text"),
        ({"rejected": ""}, "empty answer"),
        ({"rejected": "a"}, "chosen and rejected are the same"),
    ],
)
def test_invalid_single_turn_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        parse_preference({**TEXT, **fields}, format="single_turn")


def test_single_turn_needs_a_chat_template() -> None:
    with pytest.raises(BadRecord, match=r"is 'single_turn', but .* no chat template") as message:
        parse_preference(TEXT, format="single_turn", has_template=False)
    assert message.value.remedy == "set data.chat_template, or set the format to 'text'"


def test_single_turn_keeps_white_space() -> None:
    texts = {"prompt": " q\n", "chosen": "a ", "rejected": " b", "system": "s"}
    chat = parse_preference(texts, format="single_turn")
    contents = [message["content"] for message in (*chat.prompt, *chat.chosen, *chat.rejected)]
    assert contents == ["s", " q\n", "a ", " b"]

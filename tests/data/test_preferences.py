"""Records as TRL reads them, and what is said of those that are no pairs."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.data.sources.preferences import parse_preference, shared_length
from megatron_idpo.data.sources.raw_record import BadRecord


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_explicit_prompts_stay_as_they_are() -> None:
    text = parse_preference({**TEXT, "score": 3})
    assert (text.prompt, text.chosen, text.rejected, text.is_chat) == ("q", "a", "b", False)
    chat = parse_preference({**CHAT, "source": None})
    assert (chat.prompt, chat.chosen, chat.is_chat) == ([user("q")], [assistant("a")], True)


def test_an_implicit_prompt_is_the_common_prefix() -> None:
    text = parse_preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (text.prompt, text.chosen, text.rejected) == ("The sky is", " blue.", " green.")
    shared = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3")]
    chat = parse_preference(
        {"chosen": [*shared, assistant("x")], "rejected": [*shared, assistant("y")]}
    )
    assert (chat.prompt, chat.chosen, chat.rejected) == (shared, [assistant("x")], [assistant("y")])


def test_a_prompt_of_another_name_is_not_left_out() -> None:
    """Training on answers to nothing would go unnoticed; TRL does it."""
    record = {"question": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(BadRecord, match="no field 'prompt', but 'question'"):
        parse_preference(record)
    assert parse_preference(record, format="text").prompt == ""
    assert parse_preference({**TEXT, "question": "q"}).prompt == "q"


def test_an_implicit_prompt_leaves_something_to_both_answers() -> None:
    longer = parse_preference({"chosen": "abc", "rejected": "abcd"})
    assert (longer.prompt, longer.chosen, longer.rejected) == ("ab", "c", "cd")


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_the_common_prefix_is_trls(chosen: str, rejected: str) -> None:
    """Against TRL's rule written as it is stated, where that does not index before the start."""
    expected = 0
    for expected in range(min(len(chosen), len(rejected))):
        if chosen[expected] != rejected[expected]:
            if expected > 0 and chosen[expected - 1] == " ":
                expected -= 1
            break
    assert shared_length(chosen, rejected) == expected


def test_a_text_prompt_beside_whole_conversations_is_read() -> None:
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


def test_transcripts_become_messages_with_a_template_and_stay_text_without() -> None:
    prompt = [user("hi\n\nthere"), assistant("hello"), user("bye")]
    for format in ("auto", "hh"):
        chat = parse_preference(HH, format=format)
        assert chat.prompt == prompt
        assert (chat.chosen, chat.rejected) == ([assistant("good bye")], [assistant("no")])
    text = parse_preference(HH, has_template=False)
    assert text.prompt.endswith("\n\nHuman: bye\n\nAssistant:") and text.chosen == " good bye"
    assert parse_preference(HH, format="text").prompt == text.prompt


def test_format_hh_reads_a_prompt_beside_bare_answers() -> None:
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
    ("role order", {**CHAT, "prompt": [user("q"), user("r")]}, {}, "out of order: 'user' after"),
    ("assistant first", {**CHAT, "prompt": [assistant("q")]}, {}, "'assistant' first"),
    ("answer by user", {**CHAT, "chosen": [user("a")]}, {}, "role out of order: 'user'"),
    (
        "answer ends with user",
        {**CHAT, "chosen": [assistant("a"), user("b")]},
        {},
        "ends with 'user'",
    ),
    (
        "conversations part at a user's turn",
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("x")]},
        {},
        "role out of order: 'user' first, in 'chosen'",
    ),
    ("unknown role", {**CHAT, "prompt": [{"role": "bot", "content": "x"}]}, {}, "role 'bot'"),
    ("sharegpt", {**CHAT, "prompt": [{"from": "human", "value": "x"}]}, {}, "'from' and 'value'"),
    ("no content", {**CHAT, "prompt": [{"role": "user"}]}, {}, "content null"),
    (
        "image",
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {},
        "part that is not text",
    ),
    ("text in list", {**CHAT, "chosen": ["a"]}, {}, "message 1 of 'chosen' is text"),
    ("mixed answers", {**CHAT, "rejected": "b"}, {}, "one is text"),
    ("chat prompt, text answers", {**TEXT, "prompt": [user("q")]}, {}, "answers as messages"),
    ("text prompt, bare chat answers", {**CHAT, "prompt": "q"}, {}, "do not begin with it"),
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
def test_what_is_no_pair_is_refused_with_its_reason(
    record: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRecord) as error:
        parse_preference(record, **options)
    assert reason in f"{error.value.reason}; {error.value.remedy}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "user", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "tools"]), JSON),
    st.sampled_from(["auto", "text", "chat", "hh"]),
    st.booleans(),
)
def test_any_json_is_a_pair_or_a_reason(record: Any, format: Any, has_template: bool) -> None:
    try:
        preference = parse_preference(record, format=format, has_template=has_template)
    except BadRecord as error:
        assert error.reason
    else:
        assert preference.chosen and preference.rejected
        assert preference.chosen != preference.rejected


def test_a_bad_record_survives_a_worker_process() -> None:
    again = pickle.loads(pickle.dumps(BadRecord("reason", "remedy")))
    assert (again.reason, again.remedy, str(again)) == ("reason", "remedy", "reason")

"""Messages, tools and tool calls that a record stores as text are read as what they stand for.

Forms that are not read are refused or noted, and other JSON is text.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.data.trained_record import (
    ANSWERS,
    CHAT,
    CHATML,
    CITY,
    ENCODES,
    JSON_CITY,
    MESSAGES,
    ONE_TURN,
    RecordReader,
    RefusedError,
    assistant,
    calls,
    user,
)


@pytest.mark.parametrize(
    "message",
    [
        {**calls(None), "tool_calls": json.dumps(calls(CITY)["tool_calls"])},
        assistant(None, function_call={"name": "weather", "arguments": JSON_CITY}),
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": CITY})},
    ],
)
def test_tool_calls_in_other_forms_are_read(read: RecordReader, message: dict[str, Any]) -> None:
    """As `datasets` stores them, OpenAI's former `function_call`, and LLaMA-Factory's."""
    trained = read({**CHAT, "chosen": [message]}, template=ENCODES)
    assert trained.chosen == f"[weather {JSON_CITY}]</>"


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "pandas"])
@pytest.mark.parametrize("record", [CHAT, {**MESSAGES, "prompt": CHAT["prompt"]}])
def test_messages_stored_as_text_are_read(
    read: RecordReader, record: dict[str, Any], write: Callable[[Any], str]
) -> None:
    stored = {name: write(value) for name, value in record.items()}
    trained = read(stored)
    assert (trained.prompt, trained.chosen, trained.rejected) == ONE_TURN
    assert trained.notes.keys() == {"decoded"}
    assert read(stored, "text").notes.keys() >= {"undecoded"}
    with pytest.raises(RefusedError, match="set it to 'auto'"):
        read(stored, "single_turn")


def wrapped(value: Any) -> str:
    return json.dumps({"messages": value})


@pytest.mark.parametrize(
    "write",
    [
        lambda value: json.dumps(json.dumps(value)),
        wrapped,
        lambda value: json.dumps([{"id": 0, **message} for message in value]),
        lambda value: json.dumps([{"reasoning_content": None, **message} for message in value]),
    ],
    ids=["twice", "object", "other-first-key", "thoughts-first"],
)
def test_other_forms_of_stored_messages_are_read(
    read: RecordReader, write: Callable[[Any], str]
) -> None:
    stored = {name: write(value) for name, value in CHAT.items()}
    trained = read(stored)
    texts = (trained.prompt, trained.chosen, trained.rejected)
    assert texts == ONE_TURN and trained.notes.keys() == {"decoded"}
    assert read(stored, "text").notes.keys() >= {"undecoded"}
    with pytest.raises(RefusedError, match="set it to 'auto'"):
        read(stored, "single_turn")
    assert read({**stored, **ANSWERS}).prompt == ONE_TURN[0]


@pytest.mark.parametrize(
    "write",
    [
        lambda text: json.dumps([["user", "the cat"], ["assistant", text]]),
        lambda text: json.dumps([{"type": "text", "text": text}]),
    ],
    ids=["pairs", "parts"],
)
def test_stored_messages_in_a_form_that_is_not_read_are_refused(
    read: RecordReader, write: Callable[[str], str]
) -> None:
    stored = {name: write(text) for name, text in ANSWERS.items()}
    record = {"prompt": "the cat", **stored}
    for format in ("auto", "single_turn"):
        with pytest.raises(RefusedError, match=r"looks like chat messages .*; store lists of"):
            read(record, format)
    assert read(record, "text").notes.keys() == {"undecoded"}
    assert read({"prompt": stored["chosen"], **ANSWERS}).notes.keys() == {"undecoded"}
    content = {**CHAT, "prompt": [user(stored["chosen"])]}
    assert read(content).notes.keys() == {"undecoded"}


@pytest.mark.parametrize("text", ['{"role": 5}', '["a", ["b"]]', '[{"text": "a"}]', "[from x"])
def test_other_json_is_text(read: RecordReader, text: str) -> None:
    trained = read({"prompt": "the cat", "chosen": text, "rejected": text + " "})
    assert trained.chosen == text and not trained.notes


def test_text_that_only_resembles_stored_messages(read: RecordReader) -> None:
    damaged = {name: json.dumps(value)[:-1] for name, value in MESSAGES.items()}
    with pytest.raises(RefusedError, match=r"looks like chat messages .* not JSON"):
        read({"prompt": "the cat", **damaged})
    one = {**ANSWERS, "prompt": "As JSON?", "chosen": json.dumps(MESSAGES["chosen"])}
    trained = read(one)
    assert trained.chosen == one["chosen"] and trained.notes.keys() == {"undecoded"}


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
FUNCTION = {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}


@pytest.mark.parametrize(
    "tools",
    [
        [{**TOOL, "function": FUNCTION}],
        [{**TOOL, "function": json.dumps(FUNCTION)}],
        [json.dumps(TOOL)],
        json.dumps([json.dumps(TOOL)]),
        json.dumps(json.dumps([TOOL])),
    ],
    ids=["parameters", "function", "elements", "text-of-texts", "twice"],
)
def test_tools_stored_as_text_are_written_once(read: RecordReader, tools: Any) -> None:
    template = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML
    expected = read({**CHAT, "tools": [TOOL]}, template=template)
    trained = read({**CHAT, "tools": tools}, template=template)
    assert trained.prompt == expected.prompt and json.dumps(TOOL) in trained.prompt
    assert trained.notes.keys() <= {"decoded tools"} and not expected.notes


CALL = {"type": "function", "function": {"name": "weather", "arguments": CITY}}


def test_tool_calls_in_two_fields_are_refused_if_they_differ(read: RecordReader) -> None:
    both = assistant(None, tool_calls=[CALL], function_call={"name": "time", "arguments": {}})
    with pytest.raises(RefusedError, match=r"both tool_calls and function_call, .*; write all"):
        read({**CHAT, "chosen": [both]}, template=ENCODES)
    same = assistant(None, tool_calls=[json.dumps(CALL)], function_call=CALL["function"])
    trained = read({**CHAT, "chosen": [same]}, template=ENCODES)
    assert trained.chosen == f"[weather {JSON_CITY}]</>"

"""Arguments of tool calls, as objects or as JSON text: which the chat template writes correctly.

OpenAI's format has JSON text, Transformers' has objects. A template that encodes its input
(`arguments | tojson`) encodes text twice; one that does not writes an object as Python does, or
fails. Which one a template is shows in what it writes.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from megatron_idpo.data.sources.record import BadRecord, Message

type Render = Callable[[list[Message]], str]
"""Renders a whole conversation."""

_MAX_ENCODINGS = 3


def fit_tool_arguments(conversations: list[list[Message]], render: Render) -> list[list[Message]]:
    """Conversations with tool arguments that the template writes as JSON, encoded once.

    Args:
        conversations: whole ones. They are not changed.
        render: with the template.

    Returns:
        The same list if there are no arguments, or if they are written correctly as they are.

    Raises:
        BadRecord: the template fails, or writes neither form correctly.
    """
    called = [messages for messages in conversations if any(call_arguments(messages))]
    if not called:
        return conversations
    error: BadRecord | None = None
    for convert in (None, _decoded, _encoded):
        fitted = conversations
        if convert is not None:
            fitted = [_converted(messages, convert) for messages in conversations]
        try:
            if all(_is_faithful(messages, render(messages)) for messages in fitted):
                return fitted
        except BadRecord as failed:
            error = error or failed
    raise error or BadRecord(
        "the chat template writes the arguments of tool calls neither as objects nor as JSON text",
        "set data.chat_template to one that writes tool calls",
    )


def _is_faithful(messages: list[Message], written: str) -> bool:
    """Whether arguments are written neither twice encoded nor as Python writes an object."""
    for arguments in call_arguments(messages):
        encoded = {json.dumps(arguments, ensure_ascii=ascii) for ascii in (False, True)}
        if isinstance(arguments, str):
            if isinstance(_parsed(arguments), str):
                return False  # Encoded twice already.
            wrong = encoded if _decoded(arguments) is not arguments else set()
        else:
            wrong = {str(arguments)} - encoded
        if any(text in written for text in wrong):
            return False
    return True


def called_function(call: Message) -> Message:
    """The part of a tool call, or of a tool, with the name: OpenAI nests it."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def call_arguments(messages: list[Message]) -> Iterator[Any]:
    """The arguments of all tool calls, as the messages have them."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            if (arguments := called_function(call).get("arguments")) is not None:
                yield arguments


def leaf_texts(arguments: Any) -> Iterator[str]:
    """The texts and whole numbers in the values of arguments, stripped; JSON text is decoded."""
    value = _decoded(arguments) if isinstance(arguments, str) else arguments
    pending = [value]
    while pending:
        part = pending.pop(0)
        if isinstance(part, dict | list):
            pending[:0] = part.values() if isinstance(part, dict) else part
        elif isinstance(part, str) or type(part) is int:
            yield str(part).strip()


def _converted(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    def convert_call(call: Message) -> Message:
        function = called_function(call)
        if function.get("arguments") is None:
            return call
        changed = {**function, "arguments": convert(function["arguments"])}
        return changed if function is call else {**call, "function": changed}

    return [
        {**message, "tool_calls": [convert_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _decoded(value: Any) -> Any:
    """The object or list that a text encodes, once or several times; anything else as it is."""
    inner = value
    for _ in range(_MAX_ENCODINGS):
        inner = _parsed(inner) if isinstance(inner, str) else inner
    return inner if isinstance(inner, dict | list) else value


def _encoded(value: Any) -> Any:
    inner = _decoded(value)
    return json.dumps(inner, ensure_ascii=False) if isinstance(inner, dict | list) else value

"""Chat messages and tools of a record, in the form that chat templates read.

A message has `role`, text as `content`, and what else a template may read. ShareGPT's names
(`from`, `value`, `human`, `gpt`), OpenAI's function calls and values that are stored as JSON text
are converted. The order of roles is not checked: the chat template decides which it accepts.
"""

from collections.abc import Mapping
from typing import Any

from megatron_idpo.data.sources.record import BadRecord, Message, type_name
from megatron_idpo.data.sources.shapes import ROLE_ALIASES, ROLES, decode_text

_MAX_ENCODINGS = 3


def parse_messages(value: list[Any], name: str) -> list[Message]:
    """Messages with roles and text content, without the null fields that Arrow adds.

    Args:
        value: a list of messages.
        name: the field, for messages to the user.

    Raises:
        BadRecord: an element is not a message of text.
    """
    if not value and name != "prompt":
        raise BadRecord(f"empty answer: '{name}' has no messages")
    return [_message(item, f"message {at} of '{name}'") for at, item in enumerate(value, 1)]


def parse_field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field next to the messages: the value or, as TRL allows, its JSON text.

    Args:
        record: with our field names.
        name: `tools`, `history` or `chat_template_kwargs`.
        kind: the type that the value has.

    Raises:
        BadRecord: it has another type, or is text that is not JSON.
    """
    value = record.get(name)
    for _ in range(_MAX_ENCODINGS):
        if isinstance(value, str) and (value := decode_text(value)) is None:
            raise BadRecord(f"'{name}' is text, but not JSON", "correct or remove it")
    if value is not None and not isinstance(value, kind):
        expected = type_name(kind())
        remedy = f"write {expected}" + (" with one element" if isinstance(value, dict) else "")
        raise BadRecord(f"'{name}' is {type_name(value)}, not {expected}", remedy)
    return value


def parse_tools(record: Mapping[str, Any], notes: dict[str, str]) -> list[Any] | None:
    """Descriptions of tools as objects: templates would encode JSON text inside them again.

    Args:
        record: with our field names.
        notes: gets a note if something was text.

    Raises:
        BadRecord: `tools` is not a list of objects.
    """
    tools = parse_field(record, "tools", list)
    if not tools:
        return tools  # type: ignore[no-any-return]
    decoded = []
    for at, tool in enumerate(tools, 1):
        item = decode_object(tool)
        if not isinstance(item, Mapping):
            raise BadRecord(
                f"tool {at} of 'tools' is {type_name(item)}, not an object",
                'write each tool as {"type": "function", "function": {...}}',
            )
        for name in ("function", "parameters"):
            item = {**item, name: decode_object(item[name])} if name in item else item
        function = item.get("function")
        if isinstance(function, Mapping) and "parameters" in function:
            parameters = decode_object(function["parameters"])
            item = {**item, "function": {**function, "parameters": parameters}}
        decoded.append(item)
    if decoded != tools:
        notes["decoded tools"] = (
            f"{next(t for t, d in zip(tools, decoded, strict=True) if t != d)!r:.80}"
        )
    return decoded


def message_text(message: Message) -> str:
    """The text of a message; empty for one that only calls tools."""
    return message.get("content") or ""


def _message(item: Any, location: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRecord(
            f"{location} is {type_name(item)}, not an object with role and content",
            'write each message as {"role": ..., "content": ...}',
        )
    message = {key: part for key, part in item.items() if part is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message = {name: message.pop(other), **message}
    role = message.get("role")
    if role == "function_call":
        message["function_call"] = message.pop("content", None)
    if not isinstance(role, str) or role not in (*ROLES, *ROLE_ALIASES):
        raise BadRecord(f"{location} has the role {role!r}", f"roles are {', '.join(ROLES)}")
    message["role"] = ROLE_ALIASES.get(role, role)
    _convert_calls(message, location)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = "".join(_text_part(part, location) for part in content)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise BadRecord(
            f"{location} has the content {type_name(content)}, not text",
            "write it as text; an object, such as a tool's result, as JSON text",
        )
    return message


def _convert_calls(message: Message, location: str) -> None:
    """Tool calls as a list of objects, from text, an object or a list."""
    for name in ("tool_calls", "function_call"):
        calls = message.get(name)
        if isinstance(calls, str):
            message[name] = calls = decode_text(calls)
            if not isinstance(calls, list | dict):
                raise BadRecord(f"{location}: the {name} are text, but not JSON", "correct it")
    functions = message.pop("function_call", None)
    calls = message.get("tool_calls", [])
    listed = [decode_object(call) for call in (calls if isinstance(calls, list) else [calls])]
    if functions:
        own = functions if isinstance(functions, list) else [functions]
        added = [{"type": "function", "function": decode_object(call)} for call in own]
        if listed and [call["function"] for call in added] != [_function(call) for call in listed]:
            raise BadRecord(
                f"{location} has both tool_calls and function_call, which differ",
                "write all calls into tool_calls, and remove function_call",
            )
        listed = listed or added
    if not all(isinstance(call, Mapping) for call in listed):
        raise BadRecord(
            f"{location} has tool_calls that are not a list of objects",
            'write each call as {"type": "function", "function": {"name": ..., "arguments": ...}}',
        )
    if listed or "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": decode_object(call["function"])} if "function" in call else call
            for call in listed
        ]


def _function(call: Any) -> Any:
    return decode_object(call.get("function", call)) if isinstance(call, Mapping) else call


def decode_object(value: Any) -> Any:
    """The object that JSON text stands for; any other value as it is."""
    decoded = decode_text(value) if isinstance(value, str) else value
    return decoded if isinstance(decoded, Mapping) else value


def _text_part(part: Any, location: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise BadRecord(f"{location} has a part that is not text", "only text can be trained on")
    return text

"""Chat messages of a record, in the form that chat templates read.

A message has `role`, text as `content`, and what else a template may read. ShareGPT's names
(`from`, `value`, `human`, `gpt`), OpenAI's function calls and values that are stored as JSON text
are converted. The order of roles is not checked: the chat template decides which it accepts.
"""

from collections.abc import Mapping
from typing import Any

from megatron_idpo.data.sources.record import BadRecord, Message, type_name
from megatron_idpo.data.sources.shapes import decode_text

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""ShareGPT's and LLaMA-Factory's names; `function` is OpenAI's former name of a tool's result."""


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


def message_text(message: Message) -> str:
    """The text of a message; empty for one that only calls tools."""
    return message.get("content") or ""


def _message(item: Any, location: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRecord(f"{location} is {type_name(item)}, not an object with role and content")
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
        raise BadRecord(f"{location} has the content {type_name(content)}, not text")
    return message


def _convert_calls(message: Message, location: str) -> None:
    """Tool calls as a list of objects, whatever holds them."""
    for name in ("tool_calls", "function_call"):
        calls = message.get(name)
        if isinstance(calls, str):
            message[name] = calls = decode_text(calls)
            if not isinstance(calls, list | dict):
                raise BadRecord(f"{location}: the {name} are text, but not JSON")
    functions = message.pop("function_call", None)
    if functions:
        listed = functions if isinstance(functions, list) else [functions]
        message["tool_calls"] = [{"type": "function", "function": call} for call in listed]
    calls = message.get("tool_calls")
    if isinstance(calls, Mapping):
        message["tool_calls"] = [calls]
    listed = message.get("tool_calls", [])
    if not isinstance(listed, list) or not all(isinstance(call, Mapping) for call in listed):
        raise BadRecord(f"{location} has tool_calls that are not a list of objects")


def _text_part(part: Any, location: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise BadRecord(f"{location} has a part that is not text", "only text can be trained on")
    return text

"""The shapes in which preference pairs are published: where each has the prompt and the answers.

`SHAPES` is the table, one row per shape; `standard_fields` gives a record of any of them our names.
Fields that look like a part of the conversation but belong to no shape are kept
(`is_conversation_field`), so that `preferences.py` can report that they are not read.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = ("prompt", "chosen", "rejected")

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""ShareGPT's and LLaMA-Factory's names; `function` is OpenAI's former name of a tool's result."""

ANSWER_ROLES = ("assistant", "gpt", "function_call")
"""Roles of the first message of an answer, in OpenAI's and in ShareGPT's names."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a kind of record has our fields.

    Attributes:
        written_by: the library or service that documents it.
        paths: our field -> where it is: `name`, `name.name` inside an object, or `name[:-1]` and
            `name[-1:]` for all messages but the last, and the last. A record has the shape if it
            has every path of prompt, chosen and rejected.
    """

    written_by: str
    paths: Mapping[str, str]


def _shape(written_by: str, prompt: str, chosen: str, rejected: str, **more: str) -> Shape:
    return Shape(written_by, {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


SHAPES = (
    _shape("TRL", "prompt", "chosen", "rejected"),
    _shape("LLaMA-Factory, ShareGPT", "conversations", "chosen", "rejected"),
    _shape("Axolotl", "messages", "chosen", "rejected"),
    _shape(
        "OpenAI", "input.messages", "preferred_output", "non_preferred_output", tools="input.tools"
    ),
    _shape("NeMo-Aligner", "prompt", "chosen_response", "rejected_response"),
    _shape("ms-swift", "messages[:-1]", "messages[-1:]", "rejected_response"),
    Shape("ms-swift", {"chosen": "messages", "rejected": "rejected_messages"}),
)
"""The first that a record has applies. A record without any of them keeps its names."""

SHAPE_FIELDS = {re.split(r"[.\[]", path)[0] for shape in SHAPES for path in shape.paths.values()}
"""Top-level fields that some shape reads."""

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
"""Names of a separate system message; the first that is not blank is read."""

ALPACA_FIELDS = ("instruction", "input")
"""Alpaca's prompt is in two fields; LLaMA-Factory and ms-swift join them with a line break."""

_CONVERSATION = re.compile(
    r"prompt|question|query|instruction|input|messages|conversation|dialog|context|history|problem"
    r"|document|passage|article|paragraph|request|utterance|(?:user|human)_(?:message|turn|text)"
    r"|^system|^functions$|^turns$|^chat$",
    re.IGNORECASE,
)
_ABOUT_IT = re.compile(
    r"(?:^|_)(?:ids?|hash|len|length|count|num|tokens|source|type|model|lang|language|score|rating"
    r"|index|idx|level|difficulty|label|category|name|version|quality|url|date|time)$"
    r"|^(?:num|n|len|length|count|number|max|min|is|has|ids?|hash|tokens?|lang|language)_",
    re.IGNORECASE,
)
"""`prompt_id` and the like describe a prompt and are none."""

_ENCODED = re.compile(r"""\s*(?:["']\s*)?[\[{]""")
_NAMES_IN_MESSAGES = re.compile(r"role|from|text|user|human")
_DAMAGED_MESSAGES = re.compile(r"""\\*["'](?:role|from)\\*["']\s*:""")
_MAX_ENCODINGS = 3


def is_conversation_field(name: str) -> bool:
    """Whether a field's name says that it is a part of the conversation."""
    return bool(_CONVERSATION.search(name)) and not is_about_it(name)


def is_about_it(name: str) -> bool:
    """Whether a field's name says that it describes the conversation or the record."""
    return bool(_ABOUT_IT.search(name))


def standard_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the fields of its shape under our names, and all others.

    Fields that the shape reads under another name are left out.
    """
    fields = dict(record)
    shape = next((shape for shape in SHAPES if _has(record, shape)), None)
    if shape is not None:
        for path in shape.paths.values():
            fields.pop(re.split(r"[.\[]", path)[0], None)
        for name, path in shape.paths.items():
            if (value := _get(record, path)) is not None:
                fields[name] = value
    for name in SYSTEM_FIELDS[1:]:
        if not _is_filled(fields.get("system")) and _is_filled(fields.get(name)):
            fields["system"] = fields.pop(name)
    return fields


def stored_messages(value: object) -> list[Any] | None:
    """The chat messages that a text stands for; None if it does not stand for messages.

    JSON text, or Python's as pandas writes it, encoded once or several times: a list of messages,
    a single one, or an object with nothing but a list `messages` or `conversations`.
    """
    decoded = _decode_stored(value)
    if isinstance(decoded, Mapping) and len(decoded) == 1:
        decoded = decoded.get("messages", decoded.get("conversations", decoded))
    listed = [decoded] if isinstance(decoded, Mapping) else decoded
    return listed if isinstance(listed, list) and any(map(_is_message, listed)) else None


def looks_like_messages(value: object) -> bool:
    """Whether a text is chat messages, perhaps damaged, or in a form that is not read.

    Such forms are pairs of role and text, and the parts of a message's content.
    """
    if stored_messages(value) is not None:
        return True
    decoded = _decode_stored(value)
    if decoded is None:
        is_encoded = isinstance(value, str) and _ENCODED.match(value)
        return bool(is_encoded and _DAMAGED_MESSAGES.search(str(value)))
    return isinstance(decoded, list) and any(
        part[:1] and part[0] in (*ROLES, *ROLE_ALIASES) and len(part) == 2
        if isinstance(part, list)
        else isinstance(part, Mapping) and part.get("type") == "text" and "text" in part
        for part in decoded
    )


def _decode_stored(value: object) -> Any:
    if not isinstance(value, str) or not _ENCODED.match(value):
        return None
    if not _NAMES_IN_MESSAGES.search(value):
        return None
    decoded: Any = value
    for _ in range(_MAX_ENCODINGS):
        decoded = decode_text(decoded) if isinstance(decoded, str) else decoded
    return decoded


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    role = value.get("role", value.get("from"))
    is_known = isinstance(role, str) and role in (*ROLES, *ROLE_ALIASES)
    return is_known or value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"}


def decode_text(value: str) -> Any:
    """What JSON text or the text of a Python literal stands for; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes of a literal
                return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _has(record: Mapping[str, Any], shape: Shape) -> bool:
    values = {name: _get(record, path) for name, path in shape.paths.items() if name in REQUIRED}
    if not all(map(_is_filled, values.values())):
        return False
    # Whole conversations contain their prompt: `messages` next to them is a copy of one of them.
    is_whole = isinstance(values["chosen"], list) and not is_answer(values["chosen"])
    return shape.paths.get("prompt") in ("prompt", None) or not is_whole


def is_answer(value: object) -> bool:
    """Whether a value is text, or messages that begin with the model's turn."""
    if not isinstance(value, list):
        return isinstance(value, str)
    first = value[0] if value else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) in ANSWER_ROLES


def _get(record: Any, path: str) -> Any:
    names, bracket, part = path.partition("[")
    for name in names.split("."):
        if isinstance(record, str):
            record = decode_text(record)
        record = record.get(name) if isinstance(record, Mapping) else None
    if not bracket:
        return record
    if isinstance(record, str):
        record = decode_text(record)
    if not isinstance(record, list) or len(record) < 2:
        return None
    return record[:-1] if part == ":-1]" else record[-1:]


def _is_filled(value: object) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)

"""Notes about a pair: what of its record may surprise. The data report counts them.

Nothing here changes a pair. The kinds are described in `data/report.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_idpo.data.sources.messages import message_text
from megatron_idpo.data.sources.record import FIELDS, Message
from megatron_idpo.data.sources.shapes import (
    ALPACA_FIELDS,
    REQUIRED,
    is_about_it,
    is_conversation_field,
    looks_like_messages,
    stored_messages,
)

type Part = str | list[Message]
"""A prompt or an answer: text, or messages."""

_SHORT_CHARS = 12
"""Shorter texts are in others by chance: they count as read only as a line or after a label."""

_LABEL_CHARS = 24
_MIN_LABELED_CHARS = 4


def pair_notes(
    prompt: Part, chosen: Part, rejected: Part, fields: Mapping[str, Any], *, is_implicit: bool
) -> dict[str, str]:
    """Kinds of notes that apply to a pair, each with what was found.

    Args:
        prompt: as it will be trained.
        chosen: the same.
        rejected: the same.
        fields: the record, from which the pair was read.
        is_implicit: whether the record is text without a prompt.
    """
    notes: dict[str, str] = {}
    asked = _texts_of(prompt)[-1:]
    answers = [_texts_of(part)[0] for part in (chosen, rejected)]
    whole = [*_texts_of(prompt), *_texts_of(chosen), *_texts_of(rejected)]
    if isinstance(prompt, list):
        if max(len(chosen), len(rejected)) > 1:
            notes["long answer"] = ""
        if prompt and prompt[-1]["role"] == "assistant":
            notes["prefill"] = f"{asked[0]!r:.80}"
        if like := next(filter(looks_like_messages, whole), None):
            notes["undecoded"] = f"{like!r:.80}"
    if not any(text.strip() for text in asked) and len(prompt) < 2:
        notes["no prompt"] = f"'chosen' is {answers[0]!r:.80}"
    elif is_implicit:
        notes["implicit"] = f"{asked[0]!r:.80}"
    elif any(_repeats(text, answer) for text in asked for answer in answers):
        notes["repeated"] = f"{asked[0]!r:.80}"
    alpaca = [fields.get(name) for name in ALPACA_FIELDS]
    if all(isinstance(part, str) for part in alpaca) and "\n".join(map(str, alpaca)) in asked:
        notes["joined"] = f"'input' is {alpaca[1]!r:.80}"
    for name, value in fields.items():
        if _is_candidate(name, value, isinstance(prompt, str), is_implicit):
            if (text := unread_text(value, whole)) is not None:
                notes[f"unread: {name}"] = f"'{name}' is {text!r:.80}"
    return notes


def unread_text(value: Any, parts: Sequence[str]) -> str | None:
    """The first text or number in a field's value that none of the parts contains."""
    return next((text for text in _strings(value) if not _is_read(text, parts)), None)


def _is_candidate(name: str, value: Any, is_text: bool, is_implicit: bool) -> bool:
    """Whether a field may belong to the conversation."""
    if name in REQUIRED:
        return False
    if is_conversation_field(name) or (name == "tools" and is_text):
        return True
    # Without a prompt, any text of several words may be it.
    is_words = isinstance(value, str) and len(value.split()) > 1
    return is_implicit and is_words and name not in FIELDS and not is_about_it(name)


def _texts_of(part: Part) -> list[str]:
    return [part] if isinstance(part, str) else [message_text(message) for message in part]


def _repeats(prompt: str, answer: str) -> bool:
    """Whether an answer begins with the prompt, perhaps after a label, in any white space."""
    asked = " ".join(prompt.split())
    begun = " ".join(answer[: 2 * len(prompt) + 4 * _LABEL_CHARS].split())
    if not asked or begun.startswith(asked):
        return bool(asked)
    at = begun.find(asked, 0, len(asked) + _LABEL_CHARS)
    return at > 0 and len(asked) >= _MIN_LABELED_CHARS and begun[:at].rstrip()[-1] in ":>]"


def _is_read(text: str, parts: Sequence[str]) -> bool:
    if len(text) >= _SHORT_CHARS:
        return any(text in part for part in parts)
    # As a line, or the end of one after a label such as `Context: `.
    line = re.compile(rf"^(?:.*[:>\]])?[ \t]*{re.escape(text)}[ \t]*$", re.MULTILINE)
    return any(part.strip() == text or line.search(part) for part in parts)


def _strings(value: Any) -> Iterator[str]:
    """The texts and numbers in a field, of messages only what they say; stripped, not blank."""
    value = stored_messages(value) or value
    if isinstance(value, Mapping):
        if "role" in value or "from" in value:
            known = (value.get(name) for name in ("content", "value", "text", "name", "function"))
            value = [part for part in known if part is not None]
        else:
            names = [name for name in value if name == "name" or not is_about_it(str(name))]
            value = [value[name] for name in names]
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)

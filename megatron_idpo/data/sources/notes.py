"""Notes about a pair: what of its record may surprise. The data report counts them.

Nothing here changes a pair. The kinds are described in `data/report.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_idpo.data.sources.messages import message_text
from megatron_idpo.data.sources.record import Message
from megatron_idpo.data.sources.shapes import (
    ALPACA_FIELDS,
    REQUIRED,
    decode_text,
    is_conversation_field,
    looks_like_messages,
)

type Part = str | list[Message]
"""A prompt or an answer: text, or messages."""


def pair_notes(
    prompt: Part, chosen: Part, rejected: Part, fields: Mapping[str, Any]
) -> dict[str, str]:
    """Kinds of notes that apply to a pair, each with what was found.

    Args:
        prompt: as it will be trained.
        chosen: the same.
        rejected: the same.
        fields: the record, from which the pair was read.
    """
    notes: dict[str, str] = {}
    asked = _texts_of(prompt)[-1:]
    answers = [_texts_of(part)[0] for part in (chosen, rejected)]
    if isinstance(prompt, list):
        if max(len(chosen), len(rejected)) > 1:
            notes["long answer"] = ""
        if prompt and prompt[-1]["role"] == "assistant":
            notes["prefill"] = f"{asked[0]!r:.80}"
    if not any(text.strip() for text in asked) and len(prompt) < 2:
        notes["no prompt"] = f"'chosen' is {answers[0]!r:.80}"
    elif any(answer.strip().startswith(text.strip()) for text in asked for answer in answers):
        notes["repeated"] = f"{asked[0]!r:.80}"
    if all(name in fields for name in ALPACA_FIELDS):
        if "\n".join(fields[name] for name in ALPACA_FIELDS) in asked:
            notes["joined"] = f"'input' is {fields['input']!r:.80}"
    whole = [*_texts_of(prompt), *_texts_of(chosen), *_texts_of(rejected)]
    for name, value in fields.items():
        is_candidate = is_conversation_field(name) and name not in REQUIRED
        if is_candidate or (name == "tools" and isinstance(prompt, str)):
            missing = (text for text in _strings(value) if not any(text in part for part in whole))
            if (text := next(missing, None)) is not None:
                notes[f"unread: {name}"] = f"'{name}' is {text!r:.80}"
    return notes


def _texts_of(part: Part) -> list[str]:
    return [part] if isinstance(part, str) else [message_text(message) for message in part]


def _strings(value: Any) -> Iterator[str]:
    """The texts in a field: text, or that of messages or of nested lists; stripped, not blank."""
    if looks_like_messages(value):
        value = decode_text(value) or value
    if isinstance(value, Mapping):
        known = (value.get(name) for name in ("content", "value", "text", "name", "function"))
        value = [part for part in known if part is not None]
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str) and value.strip():
        yield value.strip()

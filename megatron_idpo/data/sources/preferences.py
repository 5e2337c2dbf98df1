"""One record of a preference dataset, interpreted as TRL's DPOTrainer interprets it.

A record becomes a `Preference`: prompt, chosen and rejected, all three text or all three messages.
The accepted shapes are TRL's:

* `prompt`, `chosen`, `rejected` as text, or as lists of chat messages, optionally with `tools` and
  `chat_template_kwargs`;
* no `prompt`: the longest common prefix of chosen and rejected, in characters or in messages;
* `prompt` as text with whole conversations that contain it (UltraFeedback-binarized);
* Anthropic-HH transcripts (arXiv 2204.05862), "\n\nHuman: ... \n\nAssistant: ...": with a chat
  template they become messages, without one they stay text.

The format `single_turn`, which TRL lacks, turns a text prompt and text answers into one turn of a
chat. Most instruction datasets are written that way; as text they would be trained without the chat
template that the model uses.

Other columns are ignored. A record that is not a pair raises `BadRecord` with the reason: nothing
is repaired by guessing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_idpo.data.sources.record import (
    BadRecord,
    Message,
    check_prompt_name,
    has_prompt,
    type_name,
)

type Format = Literal["auto", "text", "chat", "hh", "single_turn"]
"""What the records are: `auto` decides for each record; the others reject other shapes."""

type Answers = tuple[list[Message], list[Message]]

_NEXT_ROLES = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two answers: three texts, or three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the three are messages, which a chat template renders."""
        return not isinstance(self.chosen, str)


def parse_preference(
    record: object, *, format: Format = "auto", has_template: bool = True
) -> Preference:
    """Interpret one record.

    Args:
        record: a parsed record with our field names; anything but a mapping is refused.
        format: what the record must be.
        has_template: whether the tokenizer can render messages. Under `auto`, transcripts become
            messages only with a template; messages are refused without one.

    Raises:
        BadRecord: a missing field, an empty answer, equal answers, a role out of order, text where
            messages are needed or the reverse, or anything else that is not a pair.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"the record is {type_name(record)}, not an object with fields")
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise BadRecord(f"field '{name}' is missing", "chosen and rejected are always needed")
    if record.get("system") is not None and format != "single_turn":
        raise BadRecord(
            "there is a separate system message",
            "only the format 'single_turn' reads it: set it, or leave `system` out of columns",
        )
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if format == "hh" or (format == "auto" and has_template and _are_transcripts(record)):
        prompt, (chosen, rejected) = None, _parse_transcripts(prompt, chosen, rejected)
    elif format in ("auto", "single_turn") and isinstance(chosen, str) and not has_prompt(record):
        check_prompt_name(record, alternative="; the format 'text' ignores it")
    if format == "single_turn":
        system = record.get("system")
        prompt, (chosen, rejected) = _single_turn(prompt, chosen, rejected, system)
    _check_types(prompt, chosen, rejected, format)
    if isinstance(chosen, str):
        preference = _text_preference(prompt, chosen, rejected)
    elif has_template:
        preference = _chat_preference(prompt, chosen, rejected, record)
    else:
        message, remedy = "the record is chat messages", "give prompt, chosen and rejected as text"
        if format == "single_turn":
            message, remedy = "the format is 'single_turn'", "set the format to 'text'"
        message += ", but the tokenizer has no chat template"
        raise BadRecord(message, f"set data.chat_template, or {remedy}")
    if preference.chosen == preference.rejected:
        raise BadRecord("chosen and rejected are the same")
    return preference


def common_prefix_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """Length of the longest common prefix: of characters, messages or tokens.

    Whole prefixes are compared first: in most data one sequence is a prefix of the others.
    """
    length = min(map(len, (first, *others)))
    for other in others:
        if first[:length] != other[:length]:
            length = next(at for at in range(length) if first[at] != other[at])
    return length


def implicit_prompt_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the implicit prompt: the longest common prefix, by TRL's rules.

    Neither answer becomes empty, and in text a space before the first difference belongs to the
    answers (`trl.data_utils.extract_prompt`).
    """
    limit = min(len(chosen), len(rejected)) - 1
    shared = common_prefix_length(chosen, rejected)
    if 0 < shared <= limit and chosen[shared - 1] == " ":
        return shared - 1
    return min(shared, max(limit, 0))


def _text_preference(prompt: Any, chosen: str, rejected: Any) -> Preference:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRecord(f"empty answer: '{name}' has no text")
    if prompt is None:
        shared = implicit_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return Preference(prompt, chosen, rejected)


def _chat_preference(
    prompt: Any, chosen: Any, rejected: Any, record: Mapping[str, Any]
) -> Preference:
    chosen_messages = _messages(chosen, "chosen")
    rejected_messages = _messages(rejected, "rejected")
    if prompt is None or isinstance(prompt, str):
        shared = implicit_prompt_length(chosen_messages, rejected_messages)
        prompt_messages = chosen_messages[:shared]
        chosen_messages, rejected_messages = chosen_messages[shared:], rejected_messages[shared:]
        if prompt and all(str(m.get("content")).strip() != prompt.strip() for m in prompt_messages):
            raise BadRecord(
                "'prompt' is text, but chosen and rejected are messages that do not begin with it",
                "give the prompt as messages, or whole conversations in chosen and rejected",
            )
    else:
        prompt_messages = _messages(prompt, "prompt")
    _check_roles(prompt_messages, chosen_messages, "chosen")
    _check_roles(prompt_messages, rejected_messages, "rejected")
    tools = _parse_field(record, "tools", list)
    kwargs = _parse_field(record, "chat_template_kwargs", dict)
    return Preference(prompt_messages, chosen_messages, rejected_messages, tools, kwargs or {})


def _check_types(prompt: Any, chosen: Any, rejected: Any, format: Format) -> None:
    """Check that all are text or all messages, except for a text prompt of whole conversations."""
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list) and not (name == "prompt" and value is None):
            raise BadRecord(f"'{name}' is {type_name(value)}, neither text nor a list of messages")
        if format == "text" and isinstance(value, list):
            raise BadRecord(
                f"'{name}' is a list of messages where text is needed",
                "the format is 'text': set it to 'chat' or 'auto'",
            )
        if format == "chat" and isinstance(value, str) and name != "prompt":
            raise BadRecord(
                f"'{name}' is text where a list of messages is needed",
                "the format is 'chat': set it to 'text' or 'auto', or to 'single_turn'",
            )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("one of chosen and rejected is text, the other a list of messages")
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise BadRecord(
            "'prompt' is a list of messages, but chosen and rejected are text",
            'give the answers as messages too: [{"role": "assistant", "content": ...}]',
        )


def _messages(value: list[Any], name: str) -> list[Message]:
    """Messages with roles and text content, without the null fields that Arrow adds."""
    if not value and name != "prompt":
        raise BadRecord(f"empty answer: '{name}' has no messages")
    return [_message(item, f"message {at} of '{name}'") for at, item in enumerate(value, 1)]


def _message(item: Any, location: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRecord(f"{location} is {type_name(item)}, not an object with role and content")
    if "from" in item and "value" in item and "role" not in item:
        raise BadRecord(f"{location} has 'from' and 'value'", "rename them to 'role' and 'content'")
    message = {key: part for key, part in item.items() if part is not None}
    role, content = message.get("role"), message.get("content")
    if role not in _NEXT_ROLES or role == "":
        allowed = ", ".join(filter(None, _NEXT_ROLES))
        raise BadRecord(f"{location} has the role {role!r}", f"roles are {allowed}")
    if isinstance(content, list):
        message["content"] = content = "".join(_text_part(part, location) for part in content)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise BadRecord(f"{location} has the content {type_name(content)}, not text")
    return message


def _text_part(part: Any, location: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise BadRecord(f"{location} has a part that is not text", "only text can be trained on")
    return text


def _check_roles(prompt: list[Message], answer: list[Message], name: str) -> None:
    """Check for [system] user assistant ..., with tools; answers begin and end as assistant."""
    previous = ""
    for at, message in enumerate([*prompt, *answer], 1):
        role = message["role"]
        allowed = _NEXT_ROLES[previous]
        if at == len(prompt) + 1:
            allowed = tuple(set(allowed) & {"assistant"})
        if role not in allowed:
            after = f"after '{previous}'" if previous else "first"
            where = "the prompt" if at <= len(prompt) else f"'{name}'"
            raise BadRecord(
                f"role out of order: '{role}' {after}, in {where}, message {at} of all",
                "a prompt is [system,] user, assistant, user, ...; an answer begins as assistant",
            )
        previous = role
    if previous != "assistant":
        raise BadRecord(f"role out of order: '{name}' ends with '{previous}', not 'assistant'")
    for message in answer:
        content = message.get("content") or ""
        if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise BadRecord(f"empty answer: '{name}' has an assistant message without text")


def is_transcript(value: object) -> bool:
    """Whether a value is text that begins like an Anthropic-HH transcript and has an answer."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def _are_transcripts(record: Mapping[str, Any]) -> bool:
    if record.get("prompt") is not None:
        return False
    transcripts = [name for name in ("chosen", "rejected") if is_transcript(record[name])]
    if len(transcripts) == 1:
        raise BadRecord(
            f"of chosen and rejected only '{transcripts[0]}' is a transcript with an answer",
            "correct the record, or set the format to 'text' to train on the text as it is",
        )
    return len(transcripts) == 2


def _parse_transcripts(prompt: Any, chosen: Any, rejected: Any) -> Answers:
    """Two whole conversations; a separate prompt is put in front of bare answers."""
    conversations = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str) or not isinstance(prompt, str | None):
            raise BadRecord(
                f"'{name}' is not a transcript", "the format is 'hh', which reads text only"
            )
        text = answer if is_transcript(answer) or prompt is None else prompt + answer
        marks = list(_TURN.finditer(text))
        if not marks or marks[0].start() != 0:
            raise BadRecord(f"'{name}': the text does not begin with '\\n\\nHuman:'")
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        # One message is the text between two turn marks, without surrounding white space.
        conversations.append(
            [
                {"role": _TRANSCRIPT_ROLES[mark[1]], "content": text[mark.end() : end].strip()}
                for mark, end in zip(marks, ends, strict=True)
            ]
        )
    return conversations[0], conversations[1]


def _single_turn(
    prompt: Any, chosen: Any, rejected: Any, system: Any
) -> tuple[list[Message], Answers]:
    """The prompt as a user's message, after a system message if there is one, and the answers."""
    if prompt is None:
        raise BadRecord("field 'prompt' is missing", "the format 'single_turn' requires it")
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "system": system}
    for name, value in texts.items():
        if not isinstance(value, str) and not (name == "system" and value is None):
            message = f"'{name}' is {type_name(value)}, not text"
            raise BadRecord(message, "the format is 'single_turn', which reads text only")
    if not prompt.strip():
        raise BadRecord("'prompt' is empty")
    before = [{"role": "system", "content": system}] if system and system.strip() else []
    first, second = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return [*before, {"role": "user", "content": prompt}], (first, second)


def _parse_field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """`tools` or `chat_template_kwargs`: the value or, as TRL allows, its JSON text."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecord(f"'{name}' is text, but not JSON") from None
    if value is not None and not isinstance(value, kind):
        raise BadRecord(f"'{name}' is {type_name(value)}, not a {kind.__name__}")
    return value

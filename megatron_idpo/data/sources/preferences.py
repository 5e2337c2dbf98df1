"""One record of a preference dataset, interpreted as TRL's DPOTrainer interprets it.

A record becomes a `Preference`: prompt, chosen and rejected, all three text or all three messages.
The accepted shapes are TRL's, and those that `shapes.py` translates into them:

* `prompt`, `chosen`, `rejected` as text, or as lists of chat messages, optionally with `tools` and
  `chat_template_kwargs`;
* no `prompt`: the longest common prefix of chosen and rejected, in characters or in messages;
* a prompt that whole conversations in chosen and rejected contain (UltraFeedback-binarized);
* Anthropic-HH transcripts (arXiv 2204.05862), "\n\nHuman: ... \n\nAssistant: ...": with a chat
  template they become messages, without one they stay text.

The format `single_turn`, which TRL lacks, turns a text prompt and text answers into one turn of a
chat. Most instruction datasets are written that way; as text they would be trained without the chat
template that the model uses.

A record that is not a pair raises `BadRecord` with the reason: nothing is repaired by guessing.
What is read in a way that may surprise, or not read although it looks like a part of the
conversation, is noted in `Preference.notes`, which the data report counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_idpo.data.sources.messages import (
    message_text,
    parse_field,
    parse_messages,
    parse_tools,
)
from megatron_idpo.data.sources.notes import pair_notes, unread_text
from megatron_idpo.data.sources.record import (
    PROMPT_LIKE,
    BadRecord,
    Message,
    check_prompt_name,
    has_prompt,
    type_name,
)
from megatron_idpo.data.sources.shapes import (
    REQUIRED,
    is_answer,
    is_conversation_field,
    looks_like_messages,
    stored_messages,
)

type Format = Literal["auto", "text", "chat", "hh", "single_turn"]
"""What the records are: `auto` decides for each record; the others reject other shapes."""

type Answers = tuple[list[Message], list[Message]]

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
    notes: dict[str, str] = field(default_factory=dict, compare=False)
    """Kind of note (`data/report.py`) -> what was found."""

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
            remedy = "chosen and rejected are always needed; `columns` maps other names to them"
            raise BadRecord(f"field '{name}' is missing", remedy)
    fields = dict(record)
    notes = _decode_messages(fields, format)
    prompt, chosen, rejected = (fields.get(name) for name in REQUIRED)
    if format == "hh" or (format == "auto" and has_template and _are_transcripts(fields)):
        prompt, (chosen, rejected) = None, _parse_transcripts(prompt, chosen, rejected)
    elif format != "text" and not has_prompt(fields) and is_answer(chosen):
        _check_prompt_names(fields, PROMPT_LIKE, format)
    if format == "single_turn":
        prompt, (chosen, rejected) = _single_turn(prompt, chosen, rejected, fields)
    prompt, chosen, rejected = _same_kind(prompt, chosen, rejected)
    _check_types(prompt, chosen, rejected, format)
    if isinstance(chosen, str):
        preference = _text_preference(prompt, chosen, rejected)
        if format == "auto":
            _check_text_fields(fields)
            if has_template:
                notes["untemplated"] = ""
    elif has_template:
        preference = _chat_preference(prompt, chosen, rejected, fields, notes)
    else:
        message, remedy = "the record is chat messages", "give prompt, chosen and rejected as text"
        if format == "single_turn":
            message, remedy = "the format is 'single_turn'", "set the format to 'text'"
        message += ", but the tokenizer has no chat template"
        raise BadRecord(message, f"set data.chat_template, or {remedy}")
    if preference.chosen == preference.rejected:
        raise BadRecord("chosen and rejected are the same")
    is_implicit = prompt is None and not preference.is_chat
    if format != "text" and (is_implicit or not preference.prompt):
        _check_prompt_names(fields, tuple(filter(is_conversation_field, fields)), format)
        if preference.is_chat:  # Transformers renders no empty conversation.
            raise BadRecord("no message comes before the answers", "give the pair a prompt")
    parts = (preference.prompt, preference.chosen, preference.rejected)
    found = pair_notes(*parts, fields, is_implicit=is_implicit)
    return replace(preference, notes={**notes, **found})


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


def _check_prompt_names(fields: Mapping[str, Any], names: Sequence[str], format: Format) -> None:
    """Refuse a record without a prompt that has a field with another name for it.

    Fields whose text is in the implicit prompt are copies of it, and not meant.
    """
    answers = [fields[name] for name in ("chosen", "rejected")]
    begun = ""
    if format != "single_turn" and all(isinstance(answer, str) for answer in answers):
        begun = answers[0][: implicit_prompt_length(*answers)]
    if format == "auto" and all(map(is_transcript, answers)):
        return  # Whole conversations.
    unread = [name for name in names if unread_text(fields.get(name), [begun]) is not None]
    check_prompt_name(fields, unread)


def _decode_messages(fields: dict[str, Any], format: Format) -> dict[str, str]:
    """Replace text of messages by the messages, and single messages by lists of one; in place.

    An answer alone that looks like messages may be meant as text: both must.

    Returns:
        The notes.
    """
    notes: dict[str, str] = {}
    like = [name for name in REQUIRED if looks_like_messages(fields.get(name))]
    stored = {name: stored_messages(fields[name]) for name in like}
    decoded: dict[str, Any] = {name: value for name, value in stored.items() if value is not None}
    plain = [name for name in ("chosen", "rejected") if isinstance(fields[name], str)]
    if not decoded.keys() >= set(plain):
        if plain and set(like) >= set(plain) and format != "text":
            raise BadRecord(
                f"'{plain[0]}' looks like chat messages stored as text, but is not JSON of them",
                'store lists of {"role": ..., "content": ...}, or set the format to \'text\' to '
                "train on the text as it is",
            )
        decoded = {name: value for name, value in decoded.items() if name == "prompt"}
    for name in like:
        is_read = name in decoded and format not in ("text", "hh")
        kind = "decoded" if is_read else "undecoded"
        notes.setdefault(kind, f"'{name}' is {fields[name]:.40}")
        if is_read:
            fields[name] = decoded[name]
    for name in REQUIRED:
        if isinstance(fields.get(name), dict):
            fields[name] = [fields[name]]
    return notes


def _same_kind(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Text next to messages as a message, where only one role is possible."""
    if prompt == []:
        prompt = None
    if isinstance(prompt, list) and is_answer(chosen) and is_answer(rejected):
        chosen, rejected = (
            [{"role": "assistant", "content": part}] if isinstance(part, str) else part
            for part in (chosen, rejected)
        )
    answers = (chosen, rejected)
    if isinstance(prompt, str) and prompt.strip():
        if not isinstance(chosen, str) and all(map(is_answer, answers)):
            prompt = [{"role": "user", "content": prompt}]
    return prompt, chosen, rejected


def _text_preference(prompt: Any, chosen: str, rejected: Any) -> Preference:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRecord(f"empty answer: '{name}' has no text")
    if prompt is None:
        shared = implicit_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return Preference(prompt, chosen, rejected)


def _check_text_fields(fields: Mapping[str, Any]) -> None:
    """Refuse what only a chat can express; the format 'text' confirms that it is not wanted."""
    for name in ("system", "history", "tools"):
        if fields.get(name):
            raise BadRecord(
                f"the record is text, but has a separate '{name}'",
                "set the format to 'single_turn', which makes it a chat and reads it, or to "
                "'text' to train without it",
            )


def _chat_preference(
    prompt: Any, chosen: Any, rejected: Any, fields: Mapping[str, Any], notes: dict[str, str]
) -> Preference:
    answers = [parse_messages(chosen, "chosen"), parse_messages(rejected, "rejected")]
    if isinstance(prompt, list):
        before = parse_messages(prompt, "prompt")
        size = len(before)
        is_repeated = all(len(answer) > size and answer[:size] == before for answer in answers)
        shared = size if is_repeated else 0
    else:
        shared = implicit_prompt_length(*answers)
        before = answers[0][:shared]
        if prompt and all(message_text(m).strip() != prompt.strip() for m in before):
            raise BadRecord(
                "'prompt' is text, but chosen and rejected are messages that do not begin with it",
                "give the prompt as messages, or whole conversations in chosen and rejected",
            )
    system = fields.get("system")
    if not isinstance(system, str | None):
        raise BadRecord(f"'system' is {type_name(system)}, not text", "write it as text")
    if system and system.strip() and not (before and before[0]["role"] in ("system", "developer")):
        before = [{"role": "system", "content": system}, *before]
    first, second = (answer[shared:] for answer in answers)
    _check_answer(first, "chosen")
    _check_answer(second, "rejected")
    tools = parse_tools(fields, notes)
    kwargs = parse_field(fields, "chat_template_kwargs", dict)
    return Preference(before, first, second, tools, kwargs or {})


def _check_types(prompt: Any, chosen: Any, rejected: Any, format: Format) -> None:
    """Check that all are text or all messages, except for a text prompt of whole conversations."""
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list) and not (name == "prompt" and value is None):
            raise BadRecord(
                f"'{name}' is {type_name(value)}, neither text nor a list of messages",
                "write it as text, numbers too, or as messages; `columns` maps another column",
            )
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


def _check_answer(answer: list[Message], name: str) -> None:
    """Check that the assistant begins and ends, and writes something in each of its turns."""
    for message, verb in ((answer[0], "begins"), (answer[-1], "ends")):
        if message["role"] != "assistant":
            raise BadRecord(
                f"'{name}' {verb} with the role '{message['role']}', not 'assistant'",
                "an answer is the assistant's; turns that both answers share belong to the prompt",
            )
    for message in answer:
        is_blank = not message_text(message).strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and is_blank:
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
    prompt: Any, chosen: Any, rejected: Any, fields: Mapping[str, Any]
) -> tuple[list[Message], Answers]:
    """Earlier turns from Alpaca's `history`, the prompt as a user's message, and the answers."""
    if prompt is None:
        raise BadRecord("field 'prompt' is missing", "the format 'single_turn' requires it")
    for name, value in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items():
        if not isinstance(value, str):
            raise BadRecord(
                f"'{name}' is {type_name(value)}, not text",
                "the format is 'single_turn', which reads text only: set it to 'auto' or 'chat'",
            )
    if not prompt.strip():
        raise BadRecord("'prompt' is empty")
    turns: list[Message] = []
    for turn in parse_field(fields, "history", list) or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRecord("'history' is not a list of [question, answer]", "correct or remove it")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    first, second = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return [*turns, {"role": "user", "content": prompt}], (first, second)

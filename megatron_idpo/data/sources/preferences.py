"""One record of a preference dataset, read the way TRL's DPOTrainer reads it.

A record becomes a `Preference`: prompt, chosen and rejected, all three text or all three messages.
Accepted are the shapes that TRL reads:

* `prompt`, `chosen`, `rejected` as text, or as lists of chat messages, with `tools` and
  `chat_template_kwargs` beside them;
* no `prompt`: the longest common prefix of chosen and rejected, in characters or in messages;
* `prompt` as text beside whole conversations that contain it (UltraFeedback-binarized);
* Anthropic-HH transcripts (`transcripts.py`): with a chat template they become messages; without
  one they stay text, as all text does.

Under `single_turn`, which TRL has not, text becomes a chat (`single_turn.py`).

Other columns are ignored. What cannot be a pair is a `BadRecord` with its reason: nothing is
repaired by guessing. Reading files is `sources.py`, tokens are `chat.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from megatron_idpo.data.sources.raw_record import (
    BadRecord,
    Message,
    has_no_prompt,
    kind_name,
    refuse_other_prompt,
)
from megatron_idpo.data.sources.single_turn import from_single_turn
from megatron_idpo.data.sources.transcripts import BadTranscript, is_transcript, read_transcript
from megatron_idpo.data.tokenize.common_prefix import common_length

type Format = Literal["auto", "text", "chat", "hh", "single_turn"]
"""What the records are: `auto` decides for each record; the others refuse what is not theirs."""

_NEXT_ROLES = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two answers to it: three texts, or three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the three are messages, to be rendered by a chat template."""
        return not isinstance(self.chosen, str)


def parse_preference(
    record: object, *, format: Format = "auto", has_template: bool = True
) -> Preference:
    """Turns one record into a `Preference`.

    Args:
        record: a parsed record; anything but a mapping is refused.
        format: what the record must be.
        has_template: whether the tokenizer can render messages; decides what becomes of transcripts
            under `auto`, and messages are refused without it.

    Raises:
        BadRecord: a missing field, an empty answer, equal answers, a role out of order, text where
            messages are needed or the reverse, or anything else that is not a pair.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"the record is {kind_name(record)}, not an object with fields")
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise BadRecord(f"field '{name}' is missing", "chosen and rejected are always needed")
    if record.get("system") is not None and format != "single_turn":
        raise BadRecord(
            "there is a system message beside the prompt",
            "it is read in the format 'single_turn'; else leave `system` out of columns",
        )
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if format == "hh" or (format == "auto" and has_template and _are_transcripts(record)):
        prompt, chosen, rejected = _from_transcripts(prompt, chosen, rejected)
    elif format in ("auto", "single_turn") and isinstance(chosen, str) and has_no_prompt(record):
        refuse_other_prompt(record, else_="; the format 'text' leaves it out")
    if format == "single_turn":
        prompt, chosen, rejected = from_single_turn(prompt, chosen, rejected, record.get("system"))
    _check_kinds(prompt, chosen, rejected, format)
    if isinstance(chosen, str):
        preference = _text_preference(prompt, chosen, rejected)
    else:
        if not has_template:
            _refuse_messages(format)
        preference = _chat_preference(prompt, chosen, rejected, record)
    if preference.chosen == preference.rejected:
        raise BadRecord("chosen and rejected are the same")
    return preference


def _refuse_messages(format: Format) -> NoReturn:
    """There is no chat template to render them."""
    message, remedy = "the record is chat messages", "give prompt, chosen and rejected as text"
    if format == "single_turn":
        message, remedy = "the format is 'single_turn'", "set the format to 'text'"
    raise BadRecord(
        f"{message}, but the tokenizer has no chat template", f"set data.chat_template, or {remedy}"
    )


def shared_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the implicit prompt: the longest common prefix, by TRL's rules.

    Something is always left to both answers, and in text a space before the parting belongs to the
    answers (`trl.data_utils.extract_prompt`).
    """
    limit = min(len(chosen), len(rejected)) - 1
    shared = common_length(chosen, rejected)
    if 0 < shared <= limit and chosen[shared - 1] == " ":
        return shared - 1
    return min(shared, max(limit, 0))


def _text_preference(prompt: Any, chosen: str, rejected: Any) -> Preference:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRecord(f"empty answer: '{name}' has no text")
    if prompt is None:
        shared = shared_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return Preference(prompt, chosen, rejected)


def _chat_preference(
    prompt: Any, chosen: Any, rejected: Any, record: Mapping[str, Any]
) -> Preference:
    chosen_messages = _messages(chosen, "chosen")
    rejected_messages = _messages(rejected, "rejected")
    if prompt is None or isinstance(prompt, str):
        shared = shared_length(chosen_messages, rejected_messages)
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
    tools = _parsed(record, "tools", list)
    kwargs = _parsed(record, "chat_template_kwargs", dict)
    return Preference(prompt_messages, chosen_messages, rejected_messages, tools, kwargs or {})


def _check_kinds(prompt: Any, chosen: Any, rejected: Any, format: Format) -> None:
    """All text or all messages, except for a text prompt beside whole conversations."""
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list) and not (name == "prompt" and value is None):
            raise BadRecord(f"'{name}' is {kind_name(value)}, neither text nor a list of messages")
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
        raise BadRecord("of chosen and rejected one is text and the other a list of messages")
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise BadRecord(
            "'prompt' is a list of messages, but chosen and rejected are text",
            'give the answers as messages too: [{"role": "assistant", "content": ...}]',
        )


def _messages(value: list[Any], name: str) -> list[Message]:
    """Messages with roles and text content; null fields, which Arrow adds, are left out."""
    if not value and name != "prompt":
        raise BadRecord(f"empty answer: '{name}' has no messages")
    return [_message(item, f"message {at} of '{name}'") for at, item in enumerate(value, 1)]


def _message(item: Any, location: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRecord(f"{location} is {kind_name(item)}, not an object with role and content")
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
        raise BadRecord(f"{location} has the content {kind_name(content)}, not text")
    return message


def _text_part(part: Any, location: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise BadRecord(f"{location} has a part that is not text", "only text can be trained on")
    return text


def _check_roles(prompt: list[Message], answer: list[Message], name: str) -> None:
    """[system] user assistant user ..., with tool turns; answers begin and end as assistant."""
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
                f"role out of order: '{role}' {after}, in {where}, message {at} of the whole",
                "a prompt is [system,] user, assistant, user, ...; an answer begins as assistant",
            )
        previous = role
    if previous != "assistant":
        raise BadRecord(f"role out of order: '{name}' ends with '{previous}', not 'assistant'")
    for message in answer:
        content = message.get("content") or ""
        if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise BadRecord(f"empty answer: '{name}' has an assistant message without text")


def _are_transcripts(record: Mapping[str, Any]) -> bool:
    if record.get("prompt") is not None:
        return False
    found = [
        name
        for name in ("chosen", "rejected")
        if isinstance(record[name], str) and is_transcript(record[name])
    ]
    if len(found) == 1:
        raise BadRecord(
            f"of chosen and rejected only '{found[0]}' is a transcript with an answer",
            "correct the record, or set the format to 'text' to train on the text as it is",
        )
    return len(found) == 2


def _from_transcripts(
    prompt: Any, chosen: Any, rejected: Any
) -> tuple[None, list[Message], list[Message]]:
    """Two whole conversations; a prompt beside bare answers is put in front of them."""
    conversations = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str) or not isinstance(prompt, str | None):
            raise BadRecord(
                f"'{name}' is not a transcript", "the format is 'hh', which reads text only"
            )
        text = answer if is_transcript(answer) or prompt is None else prompt + answer
        try:
            conversations.append(read_transcript(text))
        except BadTranscript as error:
            raise BadRecord(f"'{name}': {error}") from None
    return None, conversations[0], conversations[1]


def _parsed(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """`tools` or `chat_template_kwargs`: the value itself or, as TRL allows, its JSON text."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecord(f"'{name}' is text, but not JSON") from None
    if value is not None and not isinstance(value, kind):
        raise BadRecord(f"'{name}' is {kind_name(value)}, not a {kind.__name__}")
    return value

"""A pair as text: messages rendered by the chat template, and what the template did to them.

What a template does not write cannot be trained, and a template may leave out or change anything:
thoughts, tool calls, a system message. Its text is therefore searched for every message's.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from megatron_idpo.data.sources.messages import message_text
from megatron_idpo.data.sources.preferences import Preference, common_prefix_length
from megatron_idpo.data.sources.record import BadRecord, Message
from megatron_idpo.data.tokenize.answer_end import find_control_text
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.data.tokenize.tool_arguments import (
    call_arguments,
    called_function,
    fit_tool_arguments,
    leaf_texts,
)

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with text besides `content`; Transformers copies each to the others."""

_OPENING_CHARS = 64
"""A generation prompt may open with this much of an answer (`<think>`)."""

TOKEN_MARKS = re.compile(
    r"<\|[a-z][a-z0-9_]*\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]"
)
"""Control tokens of widespread chat templates, also those of other models."""

_TURN_MARKS = re.compile(r"### Instruction:|\n\nHuman:")
_TURN_PAIRS = (("\nHuman:", "\n\nAssistant:"), ("USER: ", "ASSISTANT:"))
"""Words with which other templates begin turns, alone and in this order."""


@dataclass(frozen=True, slots=True)
class PairText:
    """The prompt, and both whole sequences, as text."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool
    notes: dict[str, str] = field(default_factory=dict)
    """Kind of note (`data/report.py`) -> what was found."""


def pair_text(
    preference: Preference, tokenizer: Tokenizer, template_kwargs: dict[str, Any] | None = None
) -> PairText:
    """Render messages with the chat template; text is concatenated.

    Raises:
        BadRecord: the template fails on this conversation, writes nothing of an answer, or writes
            the turns before the answer differently once the answer is there; messages contain the
            beginning of a turn as the template writes it; or the text is not valid Unicode.
    """
    if isinstance(preference.prompt, str):
        text = _plain_text(preference, tokenizer)
    else:
        text = _chat_text(preference, tokenizer, template_kwargs or {})
    try:
        (text.chosen + text.rejected).encode()
    except UnicodeEncodeError:
        raise BadRecord("the text has a lone surrogate, which is not a character") from None
    return text


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    kwargs: dict[str, Any],
) -> str:
    """A conversation as the template writes it.

    Raises:
        BadRecord: the template fails.
    """
    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
    # A template is a program from the data or the model and can raise anything.
    except Exception as error:
        raise BadRecord(
            f"the chat template fails: {type(error).__name__}: {error}",
            "change the record, or set data.chat_template to one that can write it",
        ) from None


def _plain_text(preference: Preference, tokenizer: Tokenizer) -> PairText:
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
    notes = dict(preference.notes)
    for part in (prompt, *(part.removesuffix(tokenizer.eos_text) for part in (chosen, rejected))):
        mark = find_control_text(part, tokenizer)
        if mark is None and (other := TOKEN_MARKS.search(part)):
            mark = other[0]
        if mark:
            notes.setdefault("control", repr(mark))
            notes.pop("untemplated", None)  # A second template would be wrong.
    return PairText(prompt, prompt + chosen, prompt + rejected, False, notes)


def _chat_text(
    preference: Preference, tokenizer: Tokenizer, template_kwargs: dict[str, Any]
) -> PairText:
    kwargs = {"tools": preference.tools, **template_kwargs, **preference.template_kwargs}

    def write(messages: list[Message], *, opened: bool = False) -> str:
        return render(tokenizer, messages, add_generation_prompt=opened, kwargs=kwargs)

    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
    notes = dict(preference.notes)
    given = [[*prompt, *chosen], [*prompt, *rejected]]
    conversations = fit_tool_arguments(given, write)
    if conversations is not given:
        notes["arguments"] = repr(next(chain.from_iterable(map(call_arguments, given))))
    prompt = conversations[0][: len(prompt)]
    opened = write(prompt, opened=True)
    whole = [write(messages) for messages in conversations]
    shared = opened[: common_prefix_length(opened, *whole)]
    mark = _find_marks(conversations, tokenizer)
    if shared != opened or mark:
        finished = write(prompt)
        turn = opened[common_prefix_length(opened, finished) :]
        if len(shared) < len(opened) - len(turn):
            # Only the generation prompt may differ. The finished turns, which the template writes
            # the same with and without a generation prompt, must be in both sequences.
            raise BadRecord(
                "the chat template writes the prompt differently before an answer",
                "some write a system message into the last turn: set data.chat_template",
            )
        if mark:
            _check_not_rendered(conversations, turn.strip())
            notes["control"] = mark
        if shared != opened:
            notes["opening"] = repr(opened[len(shared) :])
    missing = next(_missing(prompt, whole[0]), None) or _missing_tool(preference.tools, whole[0])
    for name, messages, text in zip(("chosen", "rejected"), conversations, whole, strict=True):
        answer = messages[len(prompt) :]
        start = len(shared)
        lost = next(_missing(answer, text[start:], shared[-_OPENING_CHARS:]), None)
        if lost:
            blank = [{"role": message["role"], "content": ""} for message in answer]
            _check_writes_answer(name, lost, text, partial(write, [*prompt, *blank]))
        missing = missing or lost
    if missing:
        notes["left out"] = missing
    return PairText(shared, whole[0], whole[1], True, notes)


def _find_marks(conversations: list[list[Message]], tokenizer: Tokenizer) -> str | None:
    for message in chain.from_iterable(conversations):
        text = message_text(message)
        if mark := find_control_text(text, tokenizer):
            return repr(mark)
        if start := TOKEN_MARKS.search(text) or _TURN_MARKS.search(text):
            return repr(start[0])
        for first, second in _TURN_PAIRS:
            at = f"\n{text}".find(first)
            if at >= 0 and text.find(second, at) >= 0:
                return repr(first.strip())
    return None


def _check_not_rendered(conversations: list[list[Message]], turn: str) -> None:
    """Refuse messages with the beginning of the assistant's turn, which the template would repeat.

    `turn` is what the template writes there; may be empty.
    """
    for messages in conversations:
        if turn and any(turn in message_text(message) for message in messages):
            raise BadRecord(
                f"the text has been rendered by this chat template already: it contains {turn!r}",
                "set the format to 'text' if prompt and answers are text, or remove the "
                "template's text from the messages",
            )


def _check_writes_answer(name: str, lost: str, text: str, write_blank: Callable[[], str]) -> None:
    """Refuse an answer that is written like an empty one."""
    try:
        is_empty = text == write_blank()
    except BadRecord:
        return  # The template refuses an empty message, so it writes this one.
    if is_empty:
        raise BadRecord(
            f"the chat template writes nothing of '{name}': {lost} is left out",
            "set data.chat_template to one that writes it",
        )


def _missing(messages: list[Message], written: str, before: str = "") -> Iterator[str]:
    """What of the messages is not written, described.

    Args:
        messages: with texts and tool calls.
        written: by the template, for these messages.
        before: text in front of `written`, with which the first message may begin.
    """

    def is_written(text: str) -> bool:
        return text in before[max(0, len(before) - len(text) + 1) :] + written

    for message in messages:
        for name in ("content", *THOUGHT_FIELDS):
            text = message.get(name)
            text = text.strip() if isinstance(text, str) else ""
            # Some templates encode texts (a tool's result) as JSON.
            if not is_written(text) and not is_written(json.dumps(text, ensure_ascii=False)[1:-1]):
                yield repr(_lost(text, written))
        yield from _missing_calls(message.get("tool_calls") or (), written)


def _missing_calls(calls: Sequence[Message], written: str) -> Iterator[str]:
    """Calls whose name is written too few times, and texts and numbers of their arguments."""
    names = [called_function(call).get("name") for call in calls]
    for call, name in zip(calls, names, strict=True):
        if isinstance(name, str) and written.count(name) < names.count(name):
            yield f"{'the call' if name not in written else 'a call'} of the tool '{name}'"
        for text in leaf_texts(called_function(call).get("arguments")):
            forms = (text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (True, False)))
            if not any(form in written for form in forms):
                yield f"the argument {text!r:.40} of the tool '{name}'"


def _missing_tool(tools: list[Any] | None, written: str) -> str | None:
    for tool in tools or ():
        name = called_function(tool).get("name") if isinstance(tool, dict) else None
        if isinstance(name, str) and name not in written:
            return f"the description of the tool '{name}'"
    return None


def _lost(text: str, written: str) -> str:
    """`text` without the end that is written: thoughts, say, without the answer after them."""
    start = written.lstrip()
    at = text.find(start[:1]) if start else -1
    while at > 0 and not start.startswith(text[at:]):
        at = text.find(start[0], at + 1)
    return text[:at] if at > 0 else text

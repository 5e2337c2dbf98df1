"""The tokens of a prompt for one model, and the tokens that end its answers.

A prompt is rendered and encoded as training does it (`data/chat.py`): messages by the chat template
with what it writes before an answer, without further special tokens; text as it is, with those that
the tokenizer adds.
"""

from collections.abc import Sequence
from typing import Any

from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.generate.prompts import PromptRecord

_PROBE = "Yes, indeed."
"""An answer that no template writes by itself."""


def prompt_tokens(records: Sequence[PromptRecord], tokenizer: Tokenizer) -> list[list[int]]:
    """Each prompt's tokens, at the end of which the answer begins.

    Raises:
        DataError: messages without a chat template, a template that fails, or a prompt without any
            token.
    """
    return [_tokens(record, tokenizer) for record in records]


def stop_tokens(records: Sequence[PromptRecord], tokenizer: Tokenizer) -> set[int]:
    """What ends an answer: EOS, and what the chat template writes at the end of an answer.

    The latter matters to a model that learnt the end of its turns from a template whose end-of-turn
    token is not the tokenizer's EOS.
    """
    found = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    chat = next((record for record in records if not isinstance(record.prompt, str)), None)
    if chat is not None:
        whole = _rendered(chat, tokenizer, answer=_PROBE)
        tail = whole[whole.rfind(_PROBE) + len(_PROBE) :] if _PROBE in whole else ""
        [tokens] = tokenizer.encode([tail], special_tokens=False)
        found |= set([token for token in tokens if token in tokenizer.special_ids][:1])
    return found


def _tokens(record: PromptRecord, tokenizer: Tokenizer) -> list[int]:
    """See `prompt_tokens`."""
    is_text = isinstance(record.prompt, str)
    text = record.prompt if isinstance(record.prompt, str) else _rendered(record, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "the prompt has a lone surrogate, which is no character"
        raise DataError.at(record.location, message, "take it out") from None
    [tokens] = tokenizer.encode([text], special_tokens=is_text)
    if is_text and tokens[-1:] == [tokenizer.eos_id]:
        # Some tokenizers end every text with EOS; this one goes on.
        [bare] = tokenizer.encode([text], special_tokens=False)
        if bare[-1:] != [tokenizer.eos_id]:
            tokens = tokens[:-1]
    if not tokens:
        message = "the prompt has no token, so an answer has nothing to follow"
        raise DataError.at(record.location, message, "give it some text")
    return tokens


def _rendered(record: PromptRecord, tokenizer: Tokenizer, answer: str | None = None) -> str:
    """The conversation as the chat template writes it, up to an answer or with one.

    Raises:
        DataError: there is no template, or it fails.
    """
    if not tokenizer.has_chat_template:
        message = "the prompt is chat messages, but the tokenizer has no chat template"
        raise DataError.at(
            record.location, message, "set data.chat_template, or give the prompt as text"
        )
    assert not isinstance(record.prompt, str)
    messages: list[dict[str, Any]] = list(record.prompt)
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    kwargs = {"tools": record.tools, **record.template_kwargs}
    try:
        return tokenizer.render(messages, add_generation_prompt=answer is None, **kwargs)
    # A template is a program of somebody else's, and fails in any way it likes.
    except Exception as error:
        message = f"the chat template fails: {type(error).__name__}: {error}"
        remedy = "change the prompt, or set data.chat_template to one that can write it"
        raise DataError.at(record.location, message, remedy) from None

"""Token ids of prompts for one model.

Prompts are rendered and encoded as in training (`data/tokenize/chat.py`): messages through the chat
template with the generation prompt, without further special tokens; text as it is, with the special
tokens that the tokenizer adds.
"""

from collections.abc import Sequence
from typing import Any

from megatron_idpo.data.sources.record import BadRecord
from megatron_idpo.data.tokenize.rendering import render
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.data.tokenize.tool_arguments import fit_tool_arguments
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.generate.prompts import PromptRecord


def prompt_tokens(records: Sequence[PromptRecord], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt, ending where the answer starts.

    Raises:
        DataError: messages without a chat template, a template that fails, or an empty prompt.
    """
    return [_encode(record, tokenizer) for record in records]


def _encode(record: PromptRecord, tokenizer: Tokenizer) -> list[int]:
    """See `prompt_tokens`."""
    is_text = isinstance(record.prompt, str)
    text = record.prompt if isinstance(record.prompt, str) else _render(record, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "the prompt contains a lone surrogate, which is not a character"
        raise DataError.at(record.location, message, "remove it") from None
    [tokens] = tokenizer.encode([text], special_tokens=is_text)
    if is_text and tokens[-1:] == [tokenizer.eos_id]:
        # Some tokenizers append EOS to every text, but this text continues with the answer. An EOS
        # that the user wrote stays.
        [bare] = tokenizer.encode([text], special_tokens=False)
        if bare[-1:] != [tokenizer.eos_id]:
            tokens = tokens[:-1]
    if not tokens:
        raise DataError.at(record.location, "the prompt has no tokens", "give it some text")
    return tokens


def _render(record: PromptRecord, tokenizer: Tokenizer) -> str:
    """The conversation in the chat template, up to the answer.

    Raises:
        DataError: there is no template, or it fails.
    """
    if not tokenizer.has_chat_template:
        message = "the prompt is chat messages, but the tokenizer has no chat template"
        remedy = "set data.chat_template, or give the prompt as text"
        raise DataError.at(record.location, message, remedy)
    assert not isinstance(record.prompt, str)
    messages: list[dict[str, Any]] = list(record.prompt)
    kwargs = {"tools": record.tools, **record.template_kwargs}

    def write(messages: list[dict[str, Any]]) -> str:
        return render(tokenizer, messages, add_generation_prompt=True, kwargs=kwargs)

    try:
        [fitted] = fit_tool_arguments([messages], write)
        return write(fitted)
    except BadRecord as error:
        raise DataError.at(record.location, error.reason, error.remedy) from None

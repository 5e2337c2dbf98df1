"""The tokens that end the answers of training data, for exported models and for generation.

Text ends with the tokenizer's EOS. Chat answers end as the chat template ends an assistant's last
message (`chat.py` trains what the template writes), often with another token than EOS.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_idpo.data.tokenize.tokenizers import Tokenizer

_PROBE = "Yes, indeed."
"""An answer that no chat template writes itself."""

_USER = {"role": "user", "content": "Is it so?"}
_QUESTIONS: list[list[dict[str, Any]]] = [
    [_USER],
    # A few templates need a system message, or refuse a conversation without one.
    [{"role": "system", "content": "Be brief."}, _USER],
]


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """How the answers end that a tokenizer encodes."""

    eos: int | None
    """The end of texts."""

    turn_end: int | None
    """The token that ends a chat answer; None without a chat template, or if it writes no token."""

    written: str
    """What the chat template writes after an answer."""

    turn_end_text: str = ""
    """Spelling of `turn_end`."""

    @property
    def tokens(self) -> list[int]:
        """The end tokens, without duplicates: EOS, end of turn."""
        tokens = [token for token in (self.eos, self.turn_end) if token is not None]
        return list(dict.fromkeys(tokens))


def answer_end(tokenizer: Tokenizer) -> AnswerEnd:
    """The end of answers, from a conversation that the chat template renders."""
    written = _after_answer(tokenizer)
    [tokens] = tokenizer.encode([written], special_tokens=False)
    # Only the first one: those after it belong to the next turn. Some tokenizers have runs of white
    # space as added tokens, which answers contain too.
    added = (token for token in tokens if token in tokenizer.special_ids | tokenizer.added_ids)
    turn_end = next((token for token in added if tokenizer.decode([token]).strip()), None)
    spelling = "" if turn_end is None else tokenizer.decode([turn_end])
    return AnswerEnd(tokenizer.eos_id, turn_end, written, spelling)


@lru_cache(maxsize=8)  # Asked for each record and token, and found by rendering.
def chat_end(tokenizer: Tokenizer) -> AnswerEnd | None:
    """`answer_end` of chat answers; None without a chat template."""
    return answer_end(tokenizer) if tokenizer.has_chat_template else None


@lru_cache(maxsize=8)
def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens: special ones, and the end of turn, which need not be special."""
    end = chat_end(tokenizer)
    turn_end = None if end is None else end.turn_end
    return tokenizer.special_ids if turn_end is None else tokenizer.special_ids | {turn_end}


def find_control_text(text: str, tokenizer: Tokenizer) -> str | None:
    """A control token that is spelled out in a text."""
    if mark := tokenizer.control_texts.search(text):
        return mark[0]
    end = chat_end(tokenizer)
    return end.turn_end_text if end and end.turn_end_text and end.turn_end_text in text else None


def _after_answer(tokenizer: Tokenizer) -> str:
    if not tokenizer.has_chat_template:
        return ""
    for question in _QUESTIONS:
        messages = [*question, {"role": "assistant", "content": _PROBE}]
        try:
            text = tokenizer.render(messages, add_generation_prompt=False)
        # A template is a program and can raise anything.
        except Exception:
            continue
        _, found, after = text.rpartition(_PROBE)
        if found:
            return after
    return ""

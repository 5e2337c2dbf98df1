"""Tokenize a pair's text: the prompt once, and the tokens that each answer adds to it.

Both conversations are rendered (`rendering.py`) and encoded whole, as in TRL, so the tokens are
those of the finished text. The prompt's tokens are the longest common prefix of the prompt encoded
alone and of both sequences: usually the whole encoded prompt. If the tokenizer merges across the
boundary (or the template writes the start of a turn differently once the turn is finished), the
boundary moves back for both answers alike and is counted: no token of an answer is lost, both
answers continue the same tokens, and the few tokens that moved are scored in both. TRL splits at
the same position.

End of sequence: text gets the tokenizer's EOS unless it already ends with it; messages get exactly
what the template writes, including what follows the end-of-turn token (ChatML's line break), which
is scored too. TRL does the same. `truncation` also has TRL's meaning, except that a pair whose
answers are equal after truncation is dropped and counted: its gradient is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_idpo.config.data import Format
from megatron_idpo.data.sources.preferences import common_prefix_length
from megatron_idpo.data.sources.record import BadRecord
from megatron_idpo.data.tokenize.answer_end import control_ids
from megatron_idpo.data.tokenize.rendering import PairText
from megatron_idpo.data.tokenize.tokenizers import Tokenizer

type Truncation = Literal["keep_start", "drop", "error"]


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """What affects the tokens of a pair, in addition to its record and the tokenizer."""

    max_length: int | None = 1024
    """Tokens of prompt plus answer, for each answer separately; None: no limit."""

    truncation: Truncation = "keep_start"
    """`keep_start` truncates the ends of answers; a truncated answer has no EOS, which would teach
    the model to stop mid-sentence. `drop` leaves such pairs out. `error` makes them bad rows."""

    format: Format = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """For the chat template; a record's own `chat_template_kwargs` take precedence. A template that
    writes today's date (Llama 3.1) needs a fixed `date_string` here."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The tokens of a pair, and what tokenizing did to it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    """Kind of note (`data/report.py`) -> what was found."""


@dataclass(frozen=True, slots=True)
class DroppedPair:
    """A valid pair of which `max_length` leaves nothing to train on, and why."""

    reason: str


def encode_pairs(texts: Sequence[PairText], tokenizer: Tokenizer) -> list[TokenPair | BadRecord]:
    """Encode pairs, all texts of one kind in one call of the tokenizer.

    Returns:
        For each pair its tokens, or why it has none: no token before the answers, nothing left of
        an answer, or the same tokens in both.
    """
    pairs: dict[int, TokenPair | BadRecord] = {}
    for is_chat in (False, True):
        indices = [index for index, text in enumerate(texts) if text.is_chat == is_chat]
        flat = [
            part
            for index in indices
            for part in (texts[index].prompt, texts[index].chosen, texts[index].rejected)
        ]
        # A template writes its special tokens itself.
        encoded = iter(tokenizer.encode(flat, special_tokens=not is_chat))
        for index, *tokens in zip(indices, encoded, encoded, encoded, strict=True):
            try:
                pairs[index] = _split(texts[index], tokens, tokenizer)
            except BadRecord as error:
                pairs[index] = error
    return [pairs[index] for index in range(len(texts))]


def truncate(
    pair: TokenPair, max_length: int | None, truncation: Truncation
) -> TokenPair | DroppedPair:
    """Apply `max_length`: the pair unchanged, truncated, or dropped with the reason.

    Raises:
        BadRecord: `truncation` is `error` and the pair is too long.
    """
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    if max_length is None or longest <= max_length:
        return pair
    if truncation == "error":
        raise BadRecord(
            f"the pair has {longest} tokens, more than max_length {max_length}",
            f"set data.max_length to {longest} or more, or data.truncation to keep_start or drop",
        )
    if truncation == "drop":
        return DroppedPair("longer than max_length")
    answer_tokens = max_length - len(pair.prompt)
    if answer_tokens <= 0:
        return DroppedPair("the prompt fills max_length")
    chosen, rejected = pair.chosen[:answer_tokens], pair.rejected[:answer_tokens]
    if chosen == rejected:
        return DroppedPair("both answers are the same when truncated at max_length")
    return replace(pair, chosen=chosen, rejected=rejected, truncated=True)


def _split(text: PairText, encoded: list[list[int]], tokenizer: Tokenizer) -> TokenPair:
    """Split both sequences at the end of the prompt that they share."""
    prompt, chosen, rejected = encoded
    eos = tokenizer.eos_id
    if not text.is_chat:
        if eos is None:
            raise BadRecord("the tokenizer has no EOS token", "text pairs need one to end with")
        if prompt[-1:] == [eos] and common_prefix_length(prompt, chosen, rejected) < len(prompt):
            # This tokenizer ends every text with EOS, but the prompt continues with an answer. An
            # EOS that both sequences share is a BOS with the same id (OPT) and stays.
            prompt = prompt[:-1]
        chosen, rejected = (ids if ids[-1:] == [eos] else [*ids, eos] for ids in (chosen, rejected))
    shared = common_prefix_length(prompt, chosen, rejected)
    notes = dict(text.notes)
    if shared < len(prompt):
        notes["tokens merged"] = ""
    if shared == 0 and prompt:
        prompt, chosen, rejected = _force_boundary(text, prompt, chosen, rejected, tokenizer)
        shared = len(prompt)
    if shared == 0:
        raise BadRecord(
            "no token stands before the answers, so their first token cannot be predicted",
            "give every pair a prompt, or use a tokenizer that begins texts with BOS",
        )
    pair = TokenPair(prompt[:shared], chosen[shared:], rejected[shared:], notes=notes)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not any(_writes_text(token, tokenizer) for token in answer):
            raise BadRecord(
                f"empty answer: '{name}' becomes nothing but control tokens and white space",
                "remove the record, or set data.chat_template to one that writes the answer",
            )
    if pair.chosen == pair.rejected:
        lost = notes.get("left out")
        raise BadRecord(
            "chosen and rejected become the same tokens"
            + (f": the chat template does not write {lost}" if lost else ""),
            "set data.chat_template to one that writes what differs, or remove the record",
        )
    if text.is_chat and is_unterminated(pair.chosen, tokenizer):
        notes["unterminated"] = ""
    return pair


def _force_boundary(
    text: PairText, prompt: list[int], chosen: list[int], rejected: list[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[int]]:
    """Encode prompt and answers separately, if a merge has absorbed the whole prompt.

    Used only if both sequences still decode to the same text: concatenated tokens may not.
    """
    start = len(text.prompt)
    parts = tokenizer.encode([text.chosen[start:], text.rejected[start:]], special_tokens=False)
    end = [] if text.is_chat or tokenizer.eos_id is None else [tokenizer.eos_id]
    separate = [prompt + part + (end if part[-1:] != end else []) for part in parts]
    same = all(
        tokenizer.decode(new) == tokenizer.decode(old)
        for new, old in zip(separate, (chosen, rejected), strict=True)
    )
    return (prompt, separate[0], separate[1]) if same else ([], chosen, rejected)


def is_unterminated(answer: list[int], tokenizer: Tokenizer) -> bool:
    """Whether an answer does not end with a control token; white space after it is ignored."""
    for token in reversed(answer):
        if token in control_ids(tokenizer):
            return False
        if _writes_text(token, tokenizer):
            return True
    return True


def _writes_text(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token is neither a control token nor white space."""
    return token not in control_ids(tokenizer) and bool(tokenizer.decode([token]).strip())

"""From a `Preference` to tokens: the prompt once, and what each answer adds to it.

Both conversations are rendered and encoded whole, as TRL does, so the tokens are those that the
template and the tokenizer give to the finished text. The prompt's tokens are then the longest
common prefix of the prompt encoded alone and of both sequences: usually the whole encoded prompt.
Where the tokenizer merges across the boundary (or the template writes the start of a turn
differently once it is finished), the boundary moves back for both answers alike, and is counted:
no token of an answer is lost, both answers continue the same tokens, and the few tokens that
changed sides are scored in both. TRL splits there too.

End of sequence: text gets the tokenizer's EOS, unless it ends with it; messages get what the
template writes and nothing else, including what it writes after the end-of-turn token (ChatML's
line break), which is scored too. Both are TRL's ways. `truncation` also has TRL's meaning, except
that a pair whose answers are the same once cut is dropped and counted: its gradient is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_idpo.data.sources.preferences import Format, Preference
from megatron_idpo.data.sources.raw_record import BadRecord
from megatron_idpo.data.tokenize.common_prefix import common_length
from megatron_idpo.data.tokenize.tokenizers import Tokenizer

type Truncation = Literal["keep_start", "drop", "error"]


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """What decides, beside record and tokenizer, which tokens are trained."""

    max_length: int | None = 1024
    """Tokens of prompt plus answer, for each answer on its own; None: no limit."""

    truncation: Truncation = "keep_start"
    """`keep_start` cuts the ends of answers, and a cut answer has no EOS: one there would teach
    stopping mid-sentence. `drop` leaves such pairs out. `error` makes them bad rows."""

    format: Format = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """For the chat template; a record's own `chat_template_kwargs` go before them. A template that
    writes today's date (Llama 3.1) wants a fixed `date_string` here."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The tokens of a pair, and what happened on the way."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    moved: bool = False
    """The boundary lies before the end of the prompt as it is encoded alone."""

    unterminated: bool = False
    """The template wrote no control token at the end of the chosen answer."""

    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """A good pair that `max_length` leaves nothing of, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class PairText:
    """The prompt, and both whole sequences, as text."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool
    moved: bool = False
    """The prompt is shorter than the template renders it alone."""


def pair_text(
    preference: Preference, tokenizer: Tokenizer, template_kwargs: dict[str, Any] | None = None
) -> PairText:
    """Renders messages with the chat template; text is only put together.

    Raises:
        BadRecord: the template fails on this conversation, writes the turns before the answer
            differently once the answer is there, or the text is no valid Unicode.
    """
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if isinstance(prompt, str):
        assert isinstance(chosen, str) and isinstance(rejected, str)
        text = PairText(prompt, prompt + chosen, prompt + rejected, False)
    else:
        assert not isinstance(chosen, str) and not isinstance(rejected, str)
        kwargs = {
            "tools": preference.tools,
            **(template_kwargs or {}),
            **preference.template_kwargs,
        }
        opened = _render(tokenizer, prompt, True, kwargs)
        whole = [
            _render(tokenizer, [*prompt, *answer], False, kwargs) for answer in (chosen, rejected)
        ]
        shared = opened[: common_length(opened, *whole)]
        if shared != opened:
            # What the template writes of these turns whatever follows must be in both sequences.
            closed = _render(tokenizer, prompt, False, kwargs)
            if len(shared) < common_length(opened, closed):
                raise BadRecord(
                    "the chat template writes the prompt differently before an answer",
                    "some write a system message into the last turn: set data.chat_template",
                )
        text = PairText(shared, whole[0], whole[1], True, moved=shared != opened)
    try:
        (text.chosen + text.rejected).encode()
    except UnicodeEncodeError:
        raise BadRecord("the text has a lone surrogate, which is no character") from None
    return text


def encode_pairs(texts: Sequence[PairText], tokenizer: Tokenizer) -> list[TokenPair | BadRecord]:
    """Encodes pairs, untruncated, in one call to the tokenizer for each kind of text.

    Returns:
        For each pair its tokens, or why it has none: no token before the answers, nothing left of
        an answer, or the same tokens in both.
    """
    encoded: dict[int, list[list[int]]] = {}
    for is_chat in (False, True):
        locations = [location for location, text in enumerate(texts) if text.is_chat == is_chat]
        flat = [
            part
            for at in locations
            for part in (texts[at].prompt, texts[at].chosen, texts[at].rejected)
        ]
        tokens = tokenizer.encode(flat, special_tokens=not is_chat)
        encoded |= {at: tokens[3 * n : 3 * n + 3] for n, at in enumerate(locations)}
    pairs: list[TokenPair | BadRecord] = []
    for location, text in enumerate(texts):
        try:
            pairs.append(_split(text, encoded[location], tokenizer))
        except BadRecord as error:
            pairs.append(error)
    return pairs


def truncate(
    pair: TokenPair, max_length: int | None, truncation: Truncation
) -> TokenPair | Dropped:
    """Applies `max_length` to a pair: whole, cut, or dropped with the reason.

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
        return Dropped("longer than max_length")
    room = max_length - len(pair.prompt)
    if room <= 0:
        return Dropped("the prompt fills max_length")
    chosen, rejected = pair.chosen[:room], pair.rejected[:room]
    if chosen == rejected:
        return Dropped("both answers are the same once cut at max_length")
    return replace(pair, chosen=chosen, rejected=rejected, truncated=True)


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    kwargs: dict[str, Any],
) -> str:
    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
    # A template is a program of somebody else's, and fails in any way it likes.
    except Exception as error:
        raise BadRecord(
            f"the chat template fails: {type(error).__name__}: {error}",
            "change the record, or set data.chat_template to one that can write it",
        ) from None


def _split(text: PairText, encoded: list[list[int]], tokenizer: Tokenizer) -> TokenPair:
    prompt, chosen, rejected = encoded
    eos = tokenizer.eos_id
    if not text.is_chat:
        if eos is None:
            raise BadRecord("the tokenizer has no EOS token", "text pairs need one to end with")
        if prompt[-1:] == [eos] and common_length(prompt, chosen, rejected) < len(prompt):
            prompt = prompt[:-1]  # The tokenizer ends every text with EOS; this one goes on.
        chosen, rejected = (ids if ids[-1:] == [eos] else [*ids, eos] for ids in (chosen, rejected))
    shared = common_length(prompt, chosen, rejected)
    moved = text.moved or shared < len(prompt)
    if shared == 0 and prompt:
        prompt, chosen, rejected = _force_boundary(text, prompt, chosen, rejected, tokenizer)
        shared = len(prompt)
    if shared == 0:
        raise BadRecord(
            "no token stands before the answers, so their first token has nothing to follow",
            "give every pair a prompt, or use a tokenizer that begins texts with BOS",
        )
    pair = TokenPair(prompt[:shared], chosen[shared:], rejected[shared:], moved)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer:
            raise BadRecord(f"empty answer: nothing of '{name}' is left after tokenising")
    if pair.chosen == pair.rejected:
        raise BadRecord(
            "chosen and rejected become the same tokens", "does the chat template write answers?"
        )
    return replace(pair, unterminated=text.is_chat and _unterminated(pair.chosen, tokenizer))


def _force_boundary(
    text: PairText, prompt: list[int], chosen: list[int], rejected: list[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[int]]:
    """Encodes prompt and answers apart, where a merge has swallowed the whole prompt.

    Used only if both sequences still decode to the same text, so that no token is a wrong one.
    """
    start = len(text.prompt)
    parts = tokenizer.encode([text.chosen[start:], text.rejected[start:]], special_tokens=False)
    end = [] if text.is_chat or tokenizer.eos_id is None else [tokenizer.eos_id]
    apart = [prompt + part + (end if part[-1:] != end else []) for part in parts]
    same = all(
        tokenizer.decode(new) == tokenizer.decode(old)
        for new, old in zip(apart, (chosen, rejected), strict=True)
    )
    return (prompt, apart[0], apart[1]) if same else ([], chosen, rejected)


def _unterminated(answer: list[int], tokenizer: Tokenizer) -> bool:
    """Whether the last token that is not white space is an ordinary one."""
    for token in reversed(answer):
        if token in tokenizer.special_ids:
            return False
        if tokenizer.decode([token]).strip():
            return True
    return True

"""The pairs that `megatron-idpo data` prints: which ones, and their tokens as colored text.

The text is decoded from the tokens that go into the rows. Control tokens are distinguished from
text that only looks like them, line breaks are visible, other control characters are replaced by
their Unicode pictures (data must not control a terminal), and the middle of long parts is left out.

Without colors each part still has its heading, and control tokens are enclosed in `⟦ ⟧`.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from megatron_idpo.data.pairs import Pair, pair_tokens
from megatron_idpo.data.tokenize.chat import is_unterminated
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.tokenizers import Tokenizer

PART_STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}
MAX_WHOLE_TOKENS = 300
"""Longer parts are printed without their middle."""

START_TOKENS, END_TOKENS = 120, 80
"""Printed at the start and the end of a long part."""

_INDENT = "  "
_CONTEXT_TOKENS = 4
"""Decoded before a piece: some decoders strip the first space of a text, which must not be the
piece's."""

_MAX_CANDIDATES = 64
"""Pairs of full length that are searched for a truncated one."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    **{code: ord(_REPLACEMENT) for code in range(0x80, 0xA0)},
}


def truncated_parts(pair: Pair, max_length: int | None, tokenizer: Tokenizer) -> set[str]:
    """Which of `chosen` and `rejected` `max_length` has truncated.

    A truncated answer fills `max_length` together with its prompt and does not end with a control
    token. If the chat template ends answers without one, every answer of exactly that length counts
    as truncated; the data report has the exact count.

    Args:
        pair: a tokenized pair.
        max_length: `data.max_length`; None if nothing can be truncated.
        tokenizer: the tokenizer of the pair.
    """
    answers = {"chosen": pair.chosen_tokens, "rejected": pair.rejected_tokens}
    return {
        name
        for name, answer in answers.items()
        if len(pair.prompt_tokens) + len(answer) == max_length
        and is_unterminated(answer.tolist(), tokenizer)
    }


def select_pairs(
    pairs: PairDataset, max_length: int | None, tokenizer: Tokenizer, *, share_prompt: bool
) -> dict[int, str]:
    """The pair of median length, the longest, and a truncated one, or else the shortest.

    Lengths are positions in a row. A pair is selected once, so fewer than three may be returned.
    The shortest is also selected if one of the first two is already truncated.

    Returns:
        Index in `pairs` -> the reason why it was selected.
    """

    def is_truncated(index: int) -> bool:
        return bool(truncated_parts(pairs[index], max_length, tokenizer))

    tokens_P = pair_tokens(pairs.lengths_P3, share_prompt=share_prompt)
    middle = (len(pairs) - 1) // 2
    median = int(np.argpartition(tokens_P, middle)[middle])
    longest, shortest = int(tokens_P.argmax()), int(tokens_P.argmin())
    full_length_P = pairs.lengths_P3[:, 0] + pairs.lengths_P3[:, 1:].max(axis=1) == max_length
    candidates = np.flatnonzero(full_length_P)[:_MAX_CANDIDATES].tolist()
    truncated = next(filter(is_truncated, candidates), None)
    if truncated is None or any(map(is_truncated, (median, longest))):
        third = (shortest, "The shortest pair")
    else:
        third = (truncated, "A truncated pair")
    reasons = {median: "The pair of median length"}
    for index, reason in ((longest, "The longest pair"), third):
        reasons.setdefault(index, reason)
    return reasons


def print_pair(
    console: Console,
    pairs: PairDataset,
    index: int,
    max_length: int | None,
    tokenizer: Tokenizer,
    *,
    title: str,
) -> None:
    """Print one pair: where it was read, then prompt, chosen and rejected."""
    pair = pairs[index]
    console.print(Rule(Text(title, style="bold"), align="left", style="dim"))
    console.print(Text(pairs.location(index), style="dim", overflow="fold"))
    truncated = truncated_parts(pair, max_length, tokenizer)
    parts = (pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens)
    before: list[int] = []
    for (name, style), part in zip(PART_STYLES.items(), parts, strict=True):
        tokens, scored = part.tolist(), "not scored" if name == "prompt" else "scored"
        heading = Text(name, style=f"bold {style}")
        heading.append(f"  {len(tokens):,} tokens, {scored}", "not bold")
        console.print(heading)
        mark_control = not console.is_terminal
        text = part_text(tokens, tokenizer, before=before, style=style, mark_control=mark_control)
        before = pair.prompt_tokens.tolist()
        if text.plain.endswith("\n"):
            text.right_crop()
        if name in truncated:
            text.append("\n✂ truncated at max_length", "bold yellow")
        for line in text.wrap(console, console.width - len(_INDENT)):
            console.print(Text(_INDENT).append_text(line))
    console.print()


def part_text(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    *,
    before: Sequence[int] = (),
    style: str = "",
    mark_control: bool = False,
) -> Text:
    """Tokens as text, control tokens in reverse video.

    Args:
        tokens: of one part.
        tokenizer: decodes them.
        before: the tokens in front of the part, which affect how its start is decoded.
        style: of the whole text.
        mark_control: also enclose control tokens in `⟦ ⟧`, for output without reverse video.
    """
    text = Text(style=style, overflow="fold")

    def append(pieces: Iterator[tuple[bool, str]]) -> None:
        for is_control, piece in pieces:
            piece = piece.translate(_CONTROL_PICTURES)
            if is_control:
                text.append(f"⟦{piece}⟧" if mark_control else piece, "reverse")
                continue
            *lines, last = piece.split("\n")
            for line in lines:
                text.append(line).append("↵\n", "cyan dim")
            text.append(last)

    if len(tokens) <= MAX_WHOLE_TOKENS:
        append(_decode_pieces(tokens, tokenizer, before))
        return text
    append(_decode_pieces(tokens[:START_TOKENS], tokenizer, before, strip_end=True))
    num_hidden = len(tokens) - START_TOKENS - END_TOKENS
    text.append(f"\n⋯ {num_hidden:,} tokens not shown ⋯\n", "italic cyan not dim")
    hidden, end = tokens[:-END_TOKENS], tokens[-END_TOKENS:]
    append(_decode_pieces(end, tokenizer, hidden, strip_start=True))
    return text


def _decode_pieces(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    before: Sequence[int],
    *,
    strip_start: bool = False,
    strip_end: bool = False,
) -> Iterator[tuple[bool, str]]:
    """(is control token, text) of each control token and of each run of tokens between them.

    Next to left-out tokens a character may be incomplete; `strip_start` and `strip_end` remove it.
    """
    runs: list[tuple[bool, list[int]]] = []
    for is_control, run in groupby(tokens, tokenizer.special_ids.__contains__):
        run_tokens = list(run)
        runs += [(True, [token]) for token in run_tokens] if is_control else [(False, run_tokens)]
    context = list(before[-_CONTEXT_TOKENS:])
    for position, (is_control, run_tokens) in enumerate(runs):
        piece = tokenizer.decode(run_tokens)
        if not is_control:
            # The text that the run adds to its context.
            context_text = tokenizer.decode(context)
            whole = tokenizer.decode([*context, *run_tokens])
            piece = whole.removeprefix(context_text) if whole.startswith(context_text) else piece
        if strip_start and position == 0:
            piece = piece.lstrip(_REPLACEMENT)
        if strip_end and position == len(runs) - 1:
            piece = piece.rstrip(_REPLACEMENT)
        yield is_control, piece
        context = [*context, *run_tokens][-_CONTEXT_TOKENS:]

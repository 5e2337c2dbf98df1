"""Three pairs as they will be trained: which ones, and their tokens as coloured text.

The text is decoded from the very tokens that go into the rows. Control tokens are set off from text
that only looks like them, line breaks are visible, other control characters become their pictures
(data must not steer a terminal), and long parts lose their middle.

Without colours each part still has its heading, and control tokens stand in `⟦ ⟧`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from megatron_idpo.data.packing.rows import occupied_tokens
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.pair import IntArray, Pair
from megatron_idpo.data.tokenize.tokenizers import Tokenizer

PART_STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}
WHOLE_TOKENS = 300
"""Longer parts lose their middle."""

START_TOKENS, END_TOKENS = 120, 80
"""What is left of them."""

_INDENT = "  "
_CONTEXT_TOKENS = 4
"""Decoded before a piece, so that decoders which strip a text's first space strip another one."""

_CANDIDATES = 64
"""Answers whose ends are looked at, to learn how whole ones end or to find one that was cut."""

_CUT = "✂ cut at max_length"
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {
    0x7F: 0x2421,
    **{code: 0xFFFD for code in range(0x80, 0xA0)},
}
del _PICTURES[ord("\n")], _PICTURES[ord("\t")]


@dataclass(frozen=True, slots=True)
class Choice:
    """A pair to show, and why this one."""

    index: int
    why: str


class Cuts:
    """Which answers `max_length` has cut.

    An answer was cut if it fills `max_length` together with its prompt and does not end as whole
    answers do: with control tokens and what the chat template writes after them. Where the template
    ends answers without one, an answer of exactly that length counts as cut; the report says how
    many pairs really were.
    """

    def __init__(self, max_length: int | None, endings: frozenset[tuple[int, ...]]) -> None:
        """Args: `data.max_length`, None where nothing can be cut; how whole answers end."""
        self.max_length = max_length
        self._endings = endings

    @classmethod
    def learn(cls, pairs: PairDataset, max_length: int | None, tokenizer: Tokenizer) -> "Cuts":
        """Takes the endings from pairs that are shorter than `max_length`."""
        if max_length is None:
            return cls(None, frozenset())
        whole_P = np.flatnonzero(_longest_P(pairs.lengths_P3) < max_length)
        whole = (pairs[at] for at in whole_P[:_CANDIDATES].tolist())
        return cls(max_length, frozenset(_ending(p.chosen_tokens, tokenizer) for p in whole))

    def full_pairs(self, lengths_P3: IntArray) -> IntArray:
        """Indices of the pairs of which an answer may have been cut."""
        return np.flatnonzero(_longest_P(lengths_P3) == self.max_length)

    def is_cut(self, prompt: IntArray, answer: IntArray) -> bool:
        """Whether this answer to this prompt was cut."""
        if len(prompt) + len(answer) != self.max_length:
            return False
        return not any(ending and _ends(answer, ending) for ending in self._endings)

    def is_cut_pair(self, pair: Pair) -> bool:
        """Whether one of the pair's answers was cut."""
        answers = (pair.chosen_tokens, pair.rejected_tokens)
        return any(self.is_cut(pair.prompt_tokens, answer) for answer in answers)


def _longest_P(lengths_P3: IntArray) -> IntArray:
    """Tokens of prompt and longer answer."""
    longest_P: IntArray = lengths_P3[:, 0] + lengths_P3[:, 1:].max(axis=1)
    return longest_P


def _ending(answer: IntArray, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The last control token and the white space behind it; nothing if it ends with words."""
    tokens: list[int] = answer.tolist()
    for location in reversed(range(len(tokens))):
        if tokens[location] in tokenizer.special_ids:
            return tuple(tokens[location:])
        if tokenizer.decode([tokens[location]]).strip():
            break
    return ()


def _ends(answer: IntArray, ending: tuple[int, ...]) -> bool:
    return tuple(answer[-len(ending) :].tolist()) == ending


def choose(pairs: PairDataset, cuts: Cuts, *, share_prompt: bool) -> list[Choice]:
    """The pair of median length, the longest, and one that was cut, else the shortest.

    Lengths are positions in a row. A pair is shown once: fewer than three come back if there are no
    others. Where one of the first two was cut, it stands for the cut ones.
    """
    tokens_P = occupied_tokens(pairs.lengths_P3, share_prompt=share_prompt)
    median = int(np.argpartition(tokens_P, (len(pairs) - 1) // 2)[(len(pairs) - 1) // 2])
    longest, shortest = int(tokens_P.argmax()), int(tokens_P.argmin())
    found = [Choice(median, "The pair of median length"), Choice(longest, "The longest pair")]
    full_pairs = cuts.full_pairs(pairs.lengths_P3)[:_CANDIDATES].tolist()
    cut = next((at for at in full_pairs if cuts.is_cut_pair(pairs[at])), None)
    if cut is None or any(cuts.is_cut_pair(pairs[choice.index]) for choice in found):
        found.append(Choice(shortest, "The shortest pair"))
    else:
        found.append(Choice(cut, "A pair that was cut"))
    first: dict[int, Choice] = {}
    for choice in found:
        first.setdefault(choice.index, choice)
    return list(first.values())


def show_pair(
    console: Console, pairs: PairDataset, choice: Choice, tokenizer: Tokenizer, cuts: Cuts
) -> None:
    """Prints one pair: where it is from, then prompt, chosen and rejected."""
    pair = pairs[choice.index]
    console.print(Rule(Text(choice.why, style="bold"), align="left", style="dim"))
    console.print(Text(pairs.location(choice.index), style="dim", overflow="fold"))
    prompt = pair.prompt_tokens.tolist()
    for name, tokens in (
        ("prompt", prompt),
        ("chosen", pair.chosen_tokens.tolist()),
        ("rejected", pair.rejected_tokens.tolist()),
    ):
        is_prompt = name == "prompt"
        message = Text(name, style=f"bold {PART_STYLES[name]}")
        message.append(
            f"  {len(tokens):,} tokens, {'not scored' if is_prompt else 'scored'}", "not bold"
        )
        console.print(message)
        text = part_text(
            tokens,
            tokenizer,
            before=[] if is_prompt else prompt,
            style=PART_STYLES[name],
            marked=not console.is_terminal,
        )
        if text.plain.endswith("\n"):
            text.right_crop()
        if not is_prompt and cuts.is_cut(pair.prompt_tokens, np.array(tokens)):
            text.append(f"\n{_CUT}", "bold yellow")
        for line in text.wrap(console, console.width - len(_INDENT)):
            console.print(Text(_INDENT).append_text(line))
    console.print()


def part_text(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    *,
    before: Sequence[int] = (),
    style: str = "",
    marked: bool = False,
) -> Text:
    """Tokens as text, control tokens in reverse video.

    Args:
        tokens: of one part.
        tokenizer: what decodes them.
        before: the tokens in front of the part, which decide how its start is decoded.
        style: of the whole.
        marked: put control tokens into `⟦ ⟧` too, for where there is no reverse video.
    """
    text = Text(style=style, overflow="fold")
    head, hidden_tokens, tail = _shortened(tokens)
    for is_control, piece in _pieces(head, tokenizer, before, cut_end=bool(hidden_tokens)):
        _append(text, piece, is_control, marked)
    if hidden_tokens:
        text.append(f"\n⋯ {hidden_tokens:,} tokens not shown ⋯\n", "italic cyan not dim")
        left_out = tokens[: len(tokens) - len(tail)]
        for is_control, piece in _pieces(tail, tokenizer, left_out, cut_start=True):
            _append(text, piece, is_control, marked)
    return text


def _append(text: Text, piece: str, is_control: bool, marked: bool) -> None:
    piece = piece.translate(_PICTURES)
    if is_control:
        text.append(f"⟦{piece}⟧" if marked else piece, "reverse")
        return
    *lines, last = piece.split("\n")
    for line in lines:
        text.append(line).append("↵\n", "cyan dim")
    text.append(last)


def _shortened(tokens: Sequence[int]) -> tuple[Sequence[int], int, Sequence[int]]:
    """The start, how many are left out, and the end."""
    if len(tokens) <= WHOLE_TOKENS:
        return tokens, 0, ()
    hidden_tokens = len(tokens) - START_TOKENS - END_TOKENS
    return tokens[:START_TOKENS], hidden_tokens, tokens[-END_TOKENS:]


def _pieces(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    before: Sequence[int],
    *,
    cut_start: bool = False,
    cut_end: bool = False,
) -> Iterator[tuple[bool, str]]:
    """Control tokens one by one, and the text between them.

    Where tokens were left out, half a character may be left at the cut: it is not shown.
    """
    seen = list(before[-_CONTEXT_TOKENS:])
    runs: list[tuple[bool, list[int]]] = []
    for token in tokens:
        is_control = token in tokenizer.special_ids
        if runs and not is_control and not runs[-1][0]:
            runs[-1][1].append(token)
        else:
            runs.append((is_control, [token]))
    for number, (is_control, ids) in enumerate(runs):
        piece = tokenizer.decode(ids) if is_control else _decoded(ids, seen, tokenizer)
        if cut_start and number == 0:
            piece = piece.lstrip("\N{REPLACEMENT CHARACTER}")
        if cut_end and number == len(runs) - 1:
            piece = piece.rstrip("\N{REPLACEMENT CHARACTER}")
        yield is_control, piece
        seen = [*seen, *ids][-_CONTEXT_TOKENS:]


def _decoded(tokens: list[int], before: list[int], tokenizer: Tokenizer) -> str:
    """What the tokens add to the text of those before them."""
    opening = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *tokens])
    return whole.removeprefix(opening) if whole.startswith(opening) else tokenizer.decode(tokens)

"""Counts of what happened to the rows: kept, truncated, dropped, skipped, and why.

The skipped rows themselves are listed in a file (`data.bad_rows_file`); of each note about kept
pairs the first one is named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_idpo.console.text import format_count

NOTES = {
    "tokens merged": "tokens are merged across the end of the prompt (scored with both answers)",
    "long answer": "an answer has several messages, all scored",
    "joined": "the prompt is `instruction` and `input`, joined by a line break",
    "decoded": "chat messages are stored as text, and read as messages",
    "decoded tools": "descriptions of tools are stored as text, and read as objects",
    "implicit": "there is no prompt: it is the beginning that chosen and rejected have in common",
    "nulls": (
        "null fields in tool arguments, tools or chat_template_kwargs are left out: a table has "
        "them for missing fields too (JSON text or JSON lines keep what is meant)"
    ),
    "arguments": "tool arguments are converted to what the chat template writes correctly",
}
"""Kind of note -> what it says about a pair. These are expected of some data."""

WARNINGS = {
    "unread": (
        "a field is not read: write it into the prompt, map it with the source's `columns`, or "
        "remove it"
    ),
    "undecoded": "text looks like chat messages, but is trained as text",
    "no prompt": "there is no prompt: chosen and rejected have no beginning in common",
    "prefill": (
        "the prompt ends with the assistant, and answers are new turns after it (to continue the "
        "turn, write its text into both answers instead)"
    ),
    "repeated": "an answer begins with the whole prompt: remove it there, unless it is intended",
    "control": "the text contains a control token, or the start of a turn in some chat template",
    "left out": "the chat template does not write all of the text, so the model does not see it",
    "opening": (
        "the chat template opens an answer that is generated with text that it does not write "
        "before a finished one: generation begins after other text than is trained"
    ),
    "unterminated": (
        "the chat template writes no control token at the end of an answer, so the model does not "
        "learn to stop"
    ),
    "untemplated": (
        "text is trained without the chat template (data.format: single_turn applies it, text "
        "confirms that it is not wanted)"
    ),
}
"""The same for conditions that are probably unintended, although training is possible."""

_EXAMPLE_CHARS = 100


@dataclass(kw_only=True)
class Note:
    """How many kept pairs a note applies to, and the first of them."""

    count: int
    part: int
    """Of the source of the first pair, with its row."""

    row: int
    detail: str
    """What was found in the first pair; may be empty."""

    location: str = ""
    """`file:row` of the first pair; empty in the token cache, which does not depend on names."""


@dataclass(kw_only=True)
class DataReport:
    """Counts of one source, or the sum over several. Stored in the token cache."""

    rows: int = 0
    """Records read; each is kept, dropped or skipped."""

    kept_pairs: int = 0
    truncated_pairs: int = 0
    """Kept, with an answer truncated at `max_length`; it has no EOS."""

    dropped_pairs: dict[str, int] = field(default_factory=dict)
    """Valid pairs left out, by reason."""

    skipped_rows: int = 0
    """Bad rows, under `on_bad_row: skip`."""

    notes: dict[str, Note] = field(default_factory=dict)
    """About kept pairs, by kind: a key of `NOTES` or `WARNINGS`, or one with `: name` appended."""

    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    def __post_init__(self) -> None:
        """Notes may be given as mappings, as JSON stores them."""
        notes: dict[str, Any] = self.notes
        self.notes = {
            kind: Note(**note) if isinstance(note, Mapping) else note
            for kind, note in notes.items()
        }

    def note(self, kind: str, part: int, row: int, detail: str) -> None:
        """Count a kept pair; the first one is the example."""
        self._add_note(kind, Note(count=1, part=part, row=row, detail=detail[:_EXAMPLE_CHARS]))

    def add(self, other: "DataReport", location: Callable[[int, int], str] | None = None) -> None:
        """Add another report's counts.

        Args:
            other: the report.
            location: names the part and row of its notes' examples.
        """
        for entry in fields(self):
            if entry.name not in ("dropped_pairs", "notes"):
                total = getattr(self, entry.name) + getattr(other, entry.name)
                setattr(self, entry.name, total)
        for reason, count in other.dropped_pairs.items():
            self.dropped_pairs[reason] = self.dropped_pairs.get(reason, 0) + count
        for kind, note in other.notes.items():
            named = note.location if location is None else location(note.part, note.row)
            self._add_note(kind, Note(**{**vars(note), "location": named}))

    def _add_note(self, kind: str, note: Note) -> None:
        first = self.notes.setdefault(kind, note)
        if first is not note:
            first.count += note.count

    def lines(self) -> list[str]:
        """Lines for people; counts of 0 are left out."""
        counts = [
            (self.truncated_pairs, "of them truncated at max_length"),
            *((count, f"dropped: {reason}") for reason, count in self.dropped_pairs.items()),
            (self.skipped_rows, "bad rows skipped"),
        ]
        lines = [f"{self.kept_pairs} pairs kept of {self.rows} rows"]
        lines += [f"{count} {text}" for count, text in counts if count]
        lines += [*self._note_lines(NOTES), *self.warnings()]
        if self.kept_pairs:
            totals = (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
            means = [round(total / self.kept_pairs) for total in totals]
            lines.append("mean tokens: prompt {}, chosen {}, rejected {}".format(*means))
        return lines

    def warnings(self) -> list[str]:
        """Conditions that are probably unintended, although training is possible."""
        return self._note_lines(WARNINGS)

    def _note_lines(self, texts: Mapping[str, str]) -> list[str]:
        lines = []
        for kind, text in texts.items():
            for key, note in self.notes.items():
                if key.partition(":")[0] == kind:
                    example = ": ".join(filter(None, (note.location, note.detail)))
                    line = f"{format_count(note.count, 'pair')}: {text}"
                    lines.append(line + (f"; first: {example}" if example else ""))
        return lines

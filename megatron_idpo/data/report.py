"""Counts of what happened to the rows: kept, truncated, dropped, skipped, and why.

The rows themselves are listed in a file (`data.bad_rows_file`).
"""

from dataclasses import dataclass, field, fields


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

    moved_boundaries: int = 0
    """Kept pairs whose prompt has fewer tokens than when encoded alone, because tokens merge across
    its end."""

    unterminated_pairs: int = 0
    """Kept chats whose chosen answer the template does not end with a control token."""

    longer_answers: int = 0
    """Kept chats with an answer of several messages; all of them are scored, as in TRL."""

    untemplated_pairs: int = 0
    """Kept pairs of text under `format: auto`, although there is a chat template."""

    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    def add(self, other: "DataReport") -> None:
        """Add another report's counts."""
        for entry in fields(self):
            if entry.name != "dropped_pairs":
                total = getattr(self, entry.name) + getattr(other, entry.name)
                setattr(self, entry.name, total)
        for reason, count in other.dropped_pairs.items():
            self.dropped_pairs[reason] = self.dropped_pairs.get(reason, 0) + count

    def lines(self) -> list[str]:
        """Lines for people; counts of 0 are left out."""
        counts = [
            (self.truncated_pairs, "of them truncated at max_length"),
            *((count, f"dropped: {reason}") for reason, count in self.dropped_pairs.items()),
            (self.skipped_rows, "bad rows skipped"),
            (
                self.moved_boundaries,
                "with tokens merged across the end of the prompt (scored with both answers)",
            ),
            (self.longer_answers, "with answers of several messages, all scored"),
        ]
        lines = [f"{self.kept_pairs} pairs kept of {self.rows} rows"]
        lines += [f"{count} {text}" for count, text in counts if count]
        lines += self.warnings()
        if self.kept_pairs:
            totals = (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
            means = [round(total / self.kept_pairs) for total in totals]
            lines.append("mean tokens: prompt {}, chosen {}, rejected {}".format(*means))
        return lines

    def warnings(self) -> list[str]:
        """Conditions that are probably unintended, although training is possible."""
        lines = []
        if self.unterminated_pairs:
            lines.append(
                f"{self.unterminated_pairs} answers do not end with a control token: the chat "
                "template writes none, so the model does not learn to stop"
            )
        if self.untemplated_pairs:
            are = "pair is" if self.untemplated_pairs == 1 else "pairs are"
            lines.append(
                f"{self.untemplated_pairs} {are} text, trained without the chat template "
                "(data.format: single_turn applies it, text confirms that it is not wanted)"
            )
        return lines

"""What became of the rows: kept, truncated, dropped, skipped, and why.

Counts only; which rows were bad is listed in a file (`dataset.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(kw_only=True)
class DataReport:
    """Counts of a source or, added up, of several."""

    rows: int = 0
    """Records read; each is kept, dropped or skipped."""

    kept_pairs: int = 0
    truncated_pairs: int = 0
    """Kept, with an answer cut at `max_length`; it has no EOS."""

    dropped_pairs: dict[str, int] = field(default_factory=dict)
    """Good pairs left out, by reason."""

    skipped_rows: int = 0
    """Bad rows, under `on_bad_row: skip`."""

    moved_boundaries: int = 0
    """Kept pairs whose prompt is shorter than its own encoding, because tokens merge across it."""

    unterminated_pairs: int = 0
    """Kept chats whose chosen answer ends, by the template, without a control token."""

    longer_answers: int = 0
    """Kept chats with an answer of several messages; all of them are scored, as TRL does."""

    untemplated_pairs: int = 0
    """Kept pairs of text that nobody has said is meant to be, though there is a chat template."""

    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    def add(self, other: "DataReport") -> None:
        """Adds another report's counts to this one's."""
        for name in (entry.name for entry in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, int):
                setattr(self, name, mine + theirs)
        for reason, count in other.dropped_pairs.items():
            self.dropped_pairs[reason] = self.dropped_pairs.get(reason, 0) + count

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of `as_dict`."""
        return cls(**values)

    def lines(self) -> list[str]:
        """The report for people; what did not happen is left out."""
        message = [f"{self.kept_pairs} pairs kept of {self.rows} rows"]
        if self.truncated_pairs:
            message.append(f"{self.truncated_pairs} of them cut at max_length")
        message += [f"{count} dropped: {reason}" for reason, count in self.dropped_pairs.items()]
        if self.skipped_rows:
            message.append(f"{self.skipped_rows} bad rows skipped")
        if self.moved_boundaries:
            message.append(
                f"{self.moved_boundaries} with tokens merged across the end of the prompt "
                "(scored with both answers)"
            )
        message += self.warnings()
        if self.longer_answers:
            message.append(f"{self.longer_answers} with answers of several messages, all scored")
        if self.kept_pairs:
            mean = [
                round(total / self.kept_pairs)
                for total in (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
            ]
            message.append("mean tokens: prompt {}, chosen {}, rejected {}".format(*mean))
        return message

    def warnings(self) -> list[str]:
        """What is likely not meant, although pairs can be trained on as they are."""
        message = []
        if self.unterminated_pairs:
            message.append(
                f"{self.unterminated_pairs} answers do not end with a control token: the chat "
                "template writes none, so the model does not learn to stop"
            )
        if self.untemplated_pairs:
            are = "pair is" if self.untemplated_pairs == 1 else "pairs are"
            message.append(
                f"{self.untemplated_pairs} {are} text, trained without the chat template "
                "(data.format: single_turn gives text one, text says that it is meant so)"
            )
        return message

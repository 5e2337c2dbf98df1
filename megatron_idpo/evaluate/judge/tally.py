"""From verdicts to a result: counts, win rate, confidence interval, significance.

A model wins a prompt if it wins in both orders; where the orders disagree, the prompt is a tie. The
win rate counts a tie as half a win. Its interval is Wilson's, which is conservative (too wide) with
ties. The sign test ignores ties. Prompts without a verdict count in neither.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_idpo.evaluate.judge.verdicts import Order, Verdict
from megatron_idpo.figures.numbers import percent
from megatron_idpo.train.metrics.intervals import sign_test, wilson_interval

SIGNIFICANCE = 0.05
"""p-value below which the summary speaks of evidence."""

MIN_JUDGED = 0.95
"""Share of the prompts that must have a verdict for the result to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts of one comparison, in prompts."""

    wins: int = 0
    """Of the first model."""

    losses: int = 0

    ties: int = 0
    """Includes the two kinds below."""

    disagreed: int = 0
    """Ties because the verdict flipped when the answers were swapped."""

    identical: int = 0
    """Ties because both answers are identical; the judge was not asked."""

    unjudged: int = 0

    @classmethod
    def of(
        cls,
        verdicts: Mapping[tuple[int, Order], Verdict],
        num_prompts: int,
        orders: Sequence[Order],
    ) -> Self:
        """Counts the verdicts on the prompts 0 to `num_prompts` - 1.

        Args:
            verdicts: by prompt and order; may contain further prompts.
            num_prompts: prompts of the comparison.
            orders: in which this judge is asked.
        """
        counts = Counter[str]()
        for index in range(num_prompts):
            whole = verdicts.get((index, "both"))
            both = [whole] if whole else [verdicts.get((index, order)) for order in orders]
            winners = {None if verdict is None else verdict.verdict for verdict in both}
            if None in winners:
                counts["unjudged"] += 1
            elif winners == {"a"}:
                counts["wins"] += 1
            elif winners == {"b"}:
                counts["losses"] += 1
            else:
                counts["ties"] += 1
                counts["disagreed"] += len(winners) > 1
                counts["identical"] += whole is not None and whole.is_identical
        return cls(**counts)

    @property
    def judged(self) -> int:
        """Prompts with a verdict."""
        return self.wins + self.losses + self.ties

    @property
    def prompts(self) -> int:
        """Prompts with or without a verdict."""
        return self.judged + self.unjudged

    @property
    def is_enough(self) -> bool:
        """Whether the unjudged prompts are too few to change who wins."""
        return self.judged >= MIN_JUDGED * self.prompts

    @property
    def win_rate(self) -> float | None:
        """Of the first model, 0 to 1, a tie being half a win; None where nothing is judged."""
        return (self.wins + self.ties / 2) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the win rate."""
        rate = self.win_rate
        return None if rate is None else wilson_interval(rate, self.judged)

    @property
    def p_value(self) -> float:
        """Of the sign test; 1 without any win or loss."""
        return sign_test(self.wins, self.losses)

    def summary(self, a: str, b: str) -> str:
        """One sentence with rate, interval, counts and conclusion."""
        rate, interval = self.win_rate, self.interval
        if rate is None or interval is None:
            return f"{a} against {b}: none of {self.unjudged} prompts has a verdict"
        low, high = interval
        p = self.p_value
        p_text = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3g}"
        conclusion = "no evidence of a difference"
        if p < SIGNIFICANCE:
            conclusion = f"evidence for {a if self.wins > self.losses else b}"
        unjudged = f", {self.unjudged} more unjudged" if self.unjudged else ""
        warning = "" if self.is_enough else "; unreliable, because too many prompts are unjudged"
        return (
            f"{a} against {b}: {percent(rate, 1)} [{low * 100:.1f}, {high * 100:.1f}] of "
            f"{self.judged} prompts ({self.wins} won, {self.losses} lost, {self.ties} "
            f"tied{unjudged}); {conclusion} (sign test {p_text}){warning}"
        )

    def result(self, a: str, b: str, judge: str, kind: str) -> dict[str, Any]:
        """Content of `result.json`; rates are 0 to 1, null where nothing is judged."""
        low, high = self.interval or (None, None)
        return {
            "a": a,
            "b": b,
            "judge": judge,
            "kind": kind,
            "prompts": self.prompts,
            **asdict(self),
            "win_rate": self.win_rate,
            "low": low,
            "high": high,
            "p_value": self.p_value,
            "summary": self.summary(a, b),
        }

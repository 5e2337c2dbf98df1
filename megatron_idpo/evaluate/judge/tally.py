"""From verdicts to who wins: counts, a rate with its interval, and whether it means anything.

A prompt is won by the model that wins in both orders; where the orders disagree, it is a tie. The
rate counts a tie as half a win; its interval is Wilson's, which for ties is on the wide side. The
sign test leaves ties out. Prompts without a verdict are in neither.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron_idpo.evaluate.intervals import sign_test
from megatron_idpo.evaluate.judge.verdicts import Order, Verdict, Winner
from megatron_idpo.train.metrics.confidence import wilson_interval

EVIDENCE = 0.05
"""The p-value below which a difference is called one."""

ENOUGH = 0.95
"""The share of prompts that must have a verdict, for judging to have succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How the prompts of one comparison were judged."""

    wins: int = 0
    """Of the first model."""

    losses: int = 0

    ties: int = 0
    """Those below among them."""

    disagreed: int = 0
    """Ties only because the judge decided otherwise in the other order."""

    identical: int = 0
    """Ties because both answers are the same; nobody was asked."""

    unjudged: int = 0

    @classmethod
    def of(
        cls, verdicts: Mapping[tuple[int, Order], Verdict], prompts: int, orders: Iterable[Order]
    ) -> Self:
        """Count.

        Args:
            verdicts: those that stand, by prompt and order.
            prompts: how many prompts there are; they are numbered from 0.
            orders: the orders in which this judge is asked.
        """
        orders = tuple(orders)
        wins = losses = ties = disagreed = identical = unjudged = 0
        for index in range(prompts):
            found = _winners(verdicts, index, orders)
            if found is None:
                unjudged += 1
            elif found == {"a"}:
                wins += 1
            elif found == {"b"}:
                losses += 1
            else:
                ties += 1
                disagreed += len(found) > 1
                whole = verdicts.get((index, "both"))
                identical += whole is not None and whole.is_identical
        return cls(
            wins=wins,
            losses=losses,
            ties=ties,
            disagreed=disagreed,
            identical=identical,
            unjudged=unjudged,
        )

    @property
    def judged(self) -> int:
        """Prompts with a verdict."""
        return self.wins + self.losses + self.ties

    @property
    def prompts(self) -> int:
        """With a verdict or without."""
        return self.judged + self.unjudged

    @property
    def is_enough(self) -> bool:
        """Whether so few prompts have no verdict that they could hardly change who wins."""
        return self.judged >= ENOUGH * self.prompts

    @property
    def win_rate(self) -> float | None:
        """Of the first model, a tie being half a win; None where nothing is judged."""
        return (self.wins + self.ties / 2) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the win rate."""
        rate = self.win_rate
        return None if rate is None else wilson_interval(rate, self.judged)

    @property
    def p_value(self) -> float:
        """Of so uneven a split, were both models as good; 1 without any decision."""
        return sign_test(self.wins, self.losses)

    def conclusion(self, a: str, b: str) -> str:
        """Whether this is a difference, with the sign test's p-value."""
        p = self.p_value
        message = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3g}"
        if p >= EVIDENCE:
            return f"no evidence of a difference (sign test {message})"
        return f"evidence for {a if self.wins > self.losses else b} (sign test {message})"

    def summary(self, a: str, b: str) -> str:
        """One sentence, with the interval and without calling chance a win."""
        rate, interval = self.win_rate, self.interval
        if rate is None or interval is None:
            return f"{a} against {b}: none of {self.unjudged} prompts could be judged"
        low, high = interval
        unjudged = f", {self.unjudged} more unjudged" if self.unjudged else ""
        warning = "" if self.is_enough else ", but too many prompts are unjudged to rely on it"
        return (
            f"{a} against {b}: {rate * 100:.1f} % [{low * 100:.1f}, {high * 100:.1f}] of "
            f"{self.judged} prompts ({self.wins} won, {self.losses} lost, {self.ties} "
            f"tied{unjudged}); {self.conclusion(a, b)}{warning}"
        )

    def result(self, a: str, b: str, judge: str, kind: str) -> dict[str, Any]:
        """What `result.json` has; rates within 0 to 1, null where nothing is judged."""
        low, high = self.interval or (None, None)
        return {
            "a": a,
            "b": b,
            "judge": judge,
            "kind": kind,
            "prompts": self.prompts,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "disagreed": self.disagreed,
            "identical": self.identical,
            "unjudged": self.unjudged,
            "win_rate": self.win_rate,
            "low": low,
            "high": high,
            "p_value": self.p_value,
            "summary": self.summary(a, b),
        }


def _winners(
    verdicts: Mapping[tuple[int, Order], Verdict], index: int, orders: tuple[Order, ...]
) -> set[Winner] | None:
    """Every order's verdict of a prompt; None where one is missing."""
    whole = verdicts.get((index, "both"))
    found = [whole] if whole is not None else [verdicts.get((index, order)) for order in orders]
    winners = {None if verdict is None else verdict.verdict for verdict in found}
    if None in winners:
        return None
    return {winner for winner in winners if winner is not None}

"""One question to a judge, and what every kind of judge has to offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_idpo.evaluate.generate.answers import Prompt
from megatron_idpo.evaluate.judge.template import Letter
from megatron_idpo.evaluate.judge.verdicts import Order, Verdict, Winner

BOTH_ORDERS: tuple[Order, ...] = ("ab", "ba")


@dataclass(frozen=True, slots=True)
class Question:
    """Which of two answers is better?"""

    index: int
    """The prompt's number."""

    order: Order
    prompt: Prompt
    a: str
    """The answer of the comparison's first model."""

    b: str
    has_failed: bool = False
    """Whether it was put in an earlier start, and stayed without a verdict."""

    @property
    def shown(self) -> tuple[str, str]:
        """The answers, the one shown first before the other."""
        return (self.b, self.a) if self.order == "ba" else (self.a, self.b)

    def winner(self, letter: Letter) -> Winner:
        """The model that a letter means, A being what was shown first."""
        if letter == "tie":
            return "tie"
        return "a" if (letter == "A") == (self.order != "ba") else "b"

    def verdict(self, letter: Letter | None, **known: Any) -> Verdict:
        """A verdict on it; `known` are further fields of `Verdict`."""
        winner = None if letter is None else self.winner(letter)
        return Verdict(index=self.index, order=self.order, verdict=winner, **known)


class Judge(Protocol):
    """Somebody who answers questions."""

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """Put the questions, and hand on each verdict as soon as it is there, in any order.

        Raises:
            UserError: it is of no use to go on; what was handed on stays.
        """

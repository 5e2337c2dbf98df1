"""Counts become a rate, an interval and a sentence that does not call chance a win."""

import pytest

from megatron_idpo.evaluate.judge.tally import Tally
from megatron_idpo.evaluate.judge.verdicts import IDENTICAL, Order, Verdict, Winner

BOTH: tuple[Order, ...] = ("ab", "ba")


def verdicts(*found: tuple[Winner | None, Winner | None]) -> dict[tuple[int, Order], Verdict]:
    """Both orders' verdicts of each prompt; None: there is none."""
    return {
        (index, order): Verdict(index=index, order=order, verdict=winner)
        for index, pair in enumerate(found)
        for order, winner in zip(BOTH, pair, strict=True)
        if winner is not None
    }


def test_a_win_is_one_in_both_orders() -> None:
    found = verdicts(
        ("a", "a"), ("b", "b"), ("a", "b"), ("b", "a"), ("a", "tie"), ("tie", "tie"), ("a", None)
    )
    tally = Tally.of(found, 8, BOTH)  # nobody was asked about the last one
    assert tally == Tally(wins=1, losses=1, ties=4, disagreed=3, unjudged=2)
    assert tally.judged == 6 and tally.win_rate == 0.5


def test_one_verdict_suffices_where_there_is_no_order() -> None:
    winners: tuple[Winner, ...] = ("a", "a", "b", "tie", "tie")
    found: dict[tuple[int, Order], Verdict] = {
        (index, "both"): Verdict(
            index=index, order="both", verdict=winner, note=IDENTICAL if index == 4 else ""
        )
        for index, winner in enumerate(winners)
    }
    for orders in (BOTH, ("both",)):
        tally = Tally.of(found, 5, orders)
        assert tally == Tally(wins=2, losses=1, ties=2, identical=1)
    assert Tally.of(found, 3, BOTH).judged == 3, (
        "more verdicts than prompts: an earlier, longer run"
    )


def test_21_of_40_is_no_win() -> None:
    """Wilson: (0.525 + z²/80 ± z·√(0.525·0.475/40 + z²/6400)) / (1 + z²/40), z = 1.96: 37.5, 67.1.
    Sign test: 2·P(X ≤ 19), X of 40 fair coins: 0.875, since P(X = 20) is 0.1254 and the rest is
    split in two.
    """
    tally = Tally(wins=21, losses=19)
    assert tally.summary("idpo", "dpo") == (
        "idpo against dpo: 52.5 % [37.5, 67.1] of 40 prompts (21 won, 19 lost, 0 tied); "
        "no evidence of a difference (sign test p = 0.87)"
    )


@pytest.mark.parametrize(
    ("tally", "message"),
    [
        # 2·P(X ≤ 13 of 40) = 0.0385: the paper's other figure
        (Tally(wins=27, losses=13), "evidence for idpo (sign test p = 0.0385)"),
        (Tally(wins=13, losses=27), "evidence for dpo (sign test p = 0.0385)"),
        (Tally(wins=40), "evidence for idpo (sign test p < 0.001)"),
        # 2/2⁵ = 0.0625 with five, 2/2⁶ = 0.03125 with six
        (Tally(wins=5, ties=100), "no evidence of a difference (sign test p = 0.0625)"),
        (Tally(losses=6, ties=100), "evidence for dpo (sign test p = 0.0312)"),
        (Tally(ties=40), "no evidence of a difference (sign test p = 1.00)"),
    ],
)
def test_what_is_evidence(tally: Tally, message: str) -> None:
    assert tally.summary("idpo", "dpo").endswith(f"; {message}")


def test_all_ties_are_one_half() -> None:
    found = Tally(ties=40).result("idpo", "dpo", "fake", "api")
    assert found["win_rate"] == 0.5 and found["p_value"] == 1
    assert found["low"] == pytest.approx(1 - found["high"]) and found["low"] > 0.3
    assert "50.0 % [35.2, 64.8] of 40" in found["message"]


def test_what_is_unjudged_is_not_in_the_rate() -> None:
    tally = Tally(wins=3, losses=1, unjudged=4)
    found = tally.result("idpo", "dpo", "fake", "api")
    assert found["win_rate"] == 0.75 and found["prompts"] == 8 and found["unjudged"] == 4
    assert "of 4 prompts (3 won, 1 lost, 0 tied, 4 more unjudged)" in found["message"]


@pytest.mark.parametrize(("unjudged", "is_enough"), [(1, True), (2, False)])
def test_too_much_unjudged_is_told_wherever_the_sentence_goes(
    unjudged: int, is_enough: bool
) -> None:
    """A prompt in twenty may be; it goes into `result.json`, and from there into the report."""
    tally = Tally(wins=19, unjudged=unjudged)
    message = tally.result("idpo", "dpo", "fake", "api")["message"]
    assert tally.is_enough == is_enough
    assert ("but too many prompts are unjudged to rely on it" in message) != is_enough


def test_nothing_judged_has_no_rate() -> None:
    found = Tally(unjudged=4).result("idpo", "dpo", "fake", "api")
    assert found["win_rate"] is found["low"] is found["high"] is None
    assert found["message"] == "idpo against dpo: none of 4 prompts could be judged"

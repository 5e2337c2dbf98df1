"""Counts, win rate, interval and conclusion; chance is not called a win."""

import pytest

from megatron_idpo.evaluate.judge.tally import Tally
from megatron_idpo.evaluate.judge.verdicts import IDENTICAL, Order, Verdict, Winner

BOTH: tuple[Order, ...] = ("ab", "ba")


def verdicts(*pairs: tuple[Winner | None, Winner | None]) -> dict[tuple[int, Order], Verdict]:
    """Verdicts of both orders per prompt; None: there is none."""
    return {
        (index, order): Verdict(index=index, order=order, verdict=winner)
        for index, pair in enumerate(pairs)
        for order, winner in zip(BOTH, pair, strict=True)
        if winner is not None
    }


def test_a_win_needs_both_orders() -> None:
    judged = verdicts(
        ("a", "a"), ("b", "b"), ("a", "b"), ("b", "a"), ("a", "tie"), ("tie", "tie"), ("a", None)
    )
    tally = Tally.of(judged, 8, BOTH)  # the last prompt was not asked
    assert tally == Tally(wins=1, losses=1, ties=4, disagreed=3, unjudged=2)
    assert tally.judged == 6 and tally.win_rate == 0.5


def test_an_orderless_verdict_counts_for_both_orders() -> None:
    winners: tuple[Winner, ...] = ("a", "a", "b", "tie", "tie")
    judged: dict[tuple[int, Order], Verdict] = {
        (index, "both"): Verdict(
            index=index, order="both", verdict=winner, note=IDENTICAL if index == 4 else ""
        )
        for index, winner in enumerate(winners)
    }
    for orders in (BOTH, ("both",)):
        tally = Tally.of(judged, 5, orders)
        assert tally == Tally(wins=2, losses=1, ties=2, identical=1)
    assert Tally.of(judged, 3, BOTH).judged == 3, "an earlier run had more prompts"


def test_21_of_40_is_not_evidence() -> None:
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
def test_evidence_starts_at_p_below_5_percent(tally: Tally, message: str) -> None:
    assert tally.summary("idpo", "dpo").endswith(f"; {message}")


def test_only_ties_give_a_rate_of_one_half() -> None:
    scores = Tally(ties=40).result("idpo", "dpo", "fake", "api")
    assert scores["win_rate"] == 0.5 and scores["p_value"] == 1
    assert scores["low"] == pytest.approx(1 - scores["high"]) and scores["low"] > 0.3
    assert "50.0 % [35.2, 64.8] of 40" in scores["summary"]


def test_unjudged_prompts_do_not_count_in_the_rate() -> None:
    tally = Tally(wins=3, losses=1, unjudged=4)
    scores = tally.result("idpo", "dpo", "fake", "api")
    assert scores["win_rate"] == 0.75 and scores["prompts"] == 8 and scores["unjudged"] == 4
    assert "of 4 prompts (3 won, 1 lost, 0 tied, 4 more unjudged)" in scores["summary"]


@pytest.mark.parametrize(("unjudged", "is_enough"), [(1, True), (2, False)])
def test_the_summary_warns_of_too_many_unjudged_prompts(unjudged: int, is_enough: bool) -> None:
    """One in twenty is allowed. The report shows this summary."""
    tally = Tally(wins=19, unjudged=unjudged)
    message = tally.result("idpo", "dpo", "fake", "api")["summary"]
    assert tally.is_enough == is_enough
    assert ("too many prompts are unjudged" in message) != is_enough


def test_nothing_judged_has_no_rate() -> None:
    scores = Tally(unjudged=4).result("idpo", "dpo", "fake", "api")
    assert scores["win_rate"] is scores["low"] is scores["high"] is None
    assert scores["summary"] == "idpo against dpo: none of 4 prompts has a verdict"

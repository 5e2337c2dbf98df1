"""The page of settings that can be combined says what the checks say."""

from pathlib import Path

from support_matrix import page, refusals

PAGE = Path(__file__).parents[2] / "docs" / "support_matrix.md"


def test_page_is_up_to_date():
    remedy = "run python tools/support_matrix.py > docs/support_matrix.md"
    assert PAGE.read_text(encoding="utf-8") == page(), remedy


def test_refusals_are_those_of_a_run():
    assert refusals("`layout.tensor`", "`lora`, head frozen") == []
    (reason,) = refusals("`layout.tensor`", "mixture of experts")
    assert reason.startswith("`layout.sequence_parallel` is false")

"""Numbers as text."""

import math

import pytest

from megatron_idpo.figures.numbers import count, decimal, percent
from megatron_idpo.train.logging.line import format_accuracy


@pytest.mark.parametrize("wins", range(41))
def test_a_share_is_the_same_number_everywhere(wins):
    """37 of 40 was 0.93 in a line and 92 % in the report: halves were rounded to even."""
    share = wins / 40
    assert decimal(share, ".2f") == format_accuracy(share, 1.0, None)
    assert percent(share) == f"{round(100 * float(decimal(share, '.2f')))} %"
    assert percent(37 / 40) == "93 %"


def test_formats():
    assert [decimal(-1.25, "+.1f"), decimal(2.5, ".0f"), count(1234.5)] == [
        "\N{MINUS SIGN}1.3",
        "3",
        "1,235",
    ]
    assert decimal(math.nan) == percent(math.inf) == "–"
    assert count(1e300).startswith("1,000")

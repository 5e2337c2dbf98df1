"""Numbers and durations as text."""

import pytest

from megatron_idpo.console.text import format_count, format_duration, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.42"),
        (9.994, "9.99"),
        (12.34, "12.3"),
        (99.96, "100"),
        (812.4, "812"),
        (999.6, "1.0k"),
        (3123, "3.1k"),
        (99_960, "100k"),
        (1.2e6, "1.2M"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (192, "3:12"), (3725, "1:02:05"), (2 * 86400 + 3 * 3600, "2d 03:00")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_counts_have_a_plural():
    assert format_count(1, "pair") == "1 pair"
    assert format_count(1204, "pair") == "1,204 pairs"

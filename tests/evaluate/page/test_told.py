"""Numbers as people read them."""

import math

import pytest

from megatron_idpo.evaluate.report import format as told

NAN = math.nan


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (told.decimal(-0.1234, "+.3f"), "−0.123"),
        (told.decimal(NAN), "–"),
        (told.decimal(math.inf), "–"),
        (told.count(1234567.0), "1,234,567"),
        (told.count(NAN), "–"),
        (told.rate(3141.0), "3.1k"),
        (told.rate(NAN), "–"),
        (told.duration(3.14159), "3.1 s"),
        (told.duration(0.168), "0.17 s"),
        (told.duration(42.0), "42 s"),
        (told.duration(192.0), "3:12 min"),
        (told.duration(3725.0), "1:02:05 h"),
        (told.duration(183600.0), "2d 03:00"),
        (told.duration(NAN), "–"),
        (told.percent(0.525, 1), "52.5 %"),
        (told.percent(NAN), "–"),
        (told.interval(0.651, 0.899), "0.65 to 0.90"),
        (told.interval(-0.5, 0.5, "+.1f"), "−0.5 to +0.5"),
        (told.interval(NAN, 1.0), ""),
        (told.accuracy(0.0, 0.0), "tied"),
        (told.accuracy(0.0, -1.0), "0.00"),
        (told.accuracy(NAN, NAN), "–"),
        (told.setting(None), "null"),
        (told.setting(True), "true"),
        (told.setting(5e-4), "0.0005"),
        (told.setting([15, 22]), "15, 22"),
        (told.setting([]), "none"),
        (told.setting({"every": 4}), "every 4"),
    ],
)
def test_told(found: str, wanted: str) -> None:
    assert found == wanted

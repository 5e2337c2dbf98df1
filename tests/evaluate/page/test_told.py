"""Numbers as people read them."""

import math

import pytest

from megatron_idpo.evaluate.report import format as message

NAN = math.nan


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (message.decimal(-0.1234, "+.3f"), "−0.123"),
        (message.decimal(NAN), "–"),
        (message.decimal(math.inf), "–"),
        (message.count(1234567.0), "1,234,567"),
        (message.count(NAN), "–"),
        (message.rate(3141.0), "3.1k"),
        (message.rate(NAN), "–"),
        (message.duration(3.14159), "3.1 s"),
        (message.duration(0.168), "0.17 s"),
        (message.duration(42.0), "42 s"),
        (message.duration(192.0), "3:12 min"),
        (message.duration(3725.0), "1:02:05 h"),
        (message.duration(183600.0), "2d 03:00"),
        (message.duration(NAN), "–"),
        (message.percent(0.525, 1), "52.5 %"),
        (message.percent(NAN), "–"),
        (message.interval(0.651, 0.899), "0.65 to 0.90"),
        (message.interval(-0.5, 0.5, "+.1f"), "−0.5 to +0.5"),
        (message.interval(NAN, 1.0), ""),
        (message.accuracy(0.0, 0.0), "tied"),
        (message.accuracy(0.0, -1.0), "0.00"),
        (message.accuracy(NAN, NAN), "–"),
        (message.setting(None), "null"),
        (message.setting(True), "true"),
        (message.setting(5e-4), "0.0005"),
        (message.setting([15, 22]), "15, 22"),
        (message.setting([]), "none"),
        (message.setting({"every": 4}), "every 4"),
    ],
)
def test_summary(found: str, wanted: str) -> None:
    assert found == wanted

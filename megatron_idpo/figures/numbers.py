"""Numbers as text. A value that is not known (NaN, infinite) is a dash."""

import math
from decimal import ROUND_HALF_UP, Decimal

_LARGEST_ROUNDED = 1e15
"""Larger numbers have no decimals to round."""

UNKNOWN = "–"
MINUS = "\N{MINUS SIGN}"


def decimal(value: float, form: str = ".3f") -> str:
    """A number in a format such as `+,.3f`, with a typographic minus sign.

    Halves round away from 0, in the digits that Python prints: 37 of 40 is 0.93 and 93 %, where
    binary rounding would give 0.93 and 92 %.
    """
    if not math.isfinite(value):
        return UNKNOWN
    if not form.endswith("f"):  # significant digits
        return f"{value:{form}}".replace("-", MINUS)
    return _formatted(Decimal(repr(float(value))), form).replace("-", MINUS)


def _formatted(value: Decimal, form: str) -> str:
    digits = int(form[form.index(".") + 1 : -1])
    if abs(value) < _LARGEST_ROUNDED:
        value = value.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{value:{form}}"


def count(value: float) -> str:
    """`1,234`"""
    return decimal(value, ",.0f")


def percent(share: float, digits: int = 0) -> str:
    """`52 %`"""
    if not math.isfinite(share):
        return UNKNOWN
    return f"{_formatted(100 * Decimal(repr(float(share))), f'.{digits}f')} %".replace("-", MINUS)


def interval(low: float, high: float, form: str = ".2f") -> str:
    """`0.65 to 0.90`; empty where a bound is not known."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{decimal(low, form)} to {decimal(high, form)}"


def shorten(text: str, length: int) -> str:
    """Both ends of a long text, `length` characters in all; a short one unchanged."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"

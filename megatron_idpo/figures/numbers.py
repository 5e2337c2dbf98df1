"""Numbers as text. A value that is not known (NaN, infinite) is a dash."""

import math

UNKNOWN = "–"
MINUS = "\N{MINUS SIGN}"


def decimal(value: float, form: str = ".3f") -> str:
    """A number in a format, with a typographic minus sign."""
    return f"{value:{form}}".replace("-", MINUS) if math.isfinite(value) else UNKNOWN


def count(value: float) -> str:
    """`1,234`"""
    return decimal(value, ",.0f")


def percent(share: float, digits: int = 0) -> str:
    """`52 %`"""
    return f"{decimal(100 * share, f'.{digits}f')} %" if math.isfinite(share) else UNKNOWN


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

"""Numbers as people read them. What is not known is a dash."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_idpo.train.logging.line import clock_time, is_tied, short

NOTHING = "–"
MINUS = "\N{MINUS SIGN}"


def decimal(value: float, form: str = ".3f") -> str:
    """A number in a format, with a true minus sign."""
    return f"{value:{form}}".replace("-", MINUS) if math.isfinite(value) else NOTHING


def count(value: float) -> str:
    """`1,234`"""
    return decimal(value, ",.0f")


def rate(value: float) -> str:
    """About three digits: `812`, `3.1k`."""
    return short(value) if math.isfinite(value) else NOTHING


def duration(seconds: float) -> str:
    """`3:12 min`, `1:02:05 h`, `2d 03:00`; under a minute `42 s`."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.5:
        digits = 2 if seconds < 0.995 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{digits}f} s"
    message = clock_time(seconds)
    return message if "d" in message else f"{message} {'h' if message.count(':') == 2 else 'min'}"


def percent(share: float, digits: int = 0) -> str:
    """`52 %`"""
    return f"{decimal(100 * share, f'.{digits}f')} %" if math.isfinite(share) else NOTHING


def interval(low: float, high: float, form: str = ".2f") -> str:
    """`0.65 to 0.90`; nothing where a bound is not known."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{decimal(low, form)} to {decimal(high, form)}"


def accuracy(share: float, margin: float) -> str:
    """`0.78`; `tied` where policy and reference are equal, so that no pair is preferred."""
    return "tied" if is_tied(share, margin) else decimal(share, ".2f")


def setting(value: Any) -> str:
    """A value of a configuration."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(setting, value)) or "none"
        case Mapping():
            return ", ".join(f"{name} {setting(one)}" for name, one in value.items()) or "none"
        case _:
            return str(value)

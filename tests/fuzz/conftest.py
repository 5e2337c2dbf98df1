"""Prints how many inputs were tried."""

import pytest

from .budget import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """`fuzzed configurations: accepted 120`, for `tools/fuzz.py` to add up."""
    for outcome, number in sorted(COUNTS.items()):
        sort, _, name = outcome.partition(": ")
        terminalreporter.write_line(f"fuzzed {sort}: {name} {number}")

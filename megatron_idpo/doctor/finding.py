"""The doctor's report: findings in groups.

`libraries.py`, `machine.py` and `run_config.py` produce findings; `main.py` prints them.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What a finding means for a run on this machine."""

    OK = "ok"
    NOTE = "note"
    """It runs; `Finding.consequence` or `remedy` is worth knowing."""

    UNCHECKED = "unchecked"
    """It could not be checked here, such as a model that is not downloaded."""

    MISSING = "missing"
    """An optional part is not installed."""

    BROKEN = "broken"
    """A run that needs it fails."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    """`Transformer Engine`, `layout`, …"""

    state: State

    value: str
    """A version, an amount, `not installed`."""

    consequence: str = ""
    """What does not work or is slower because of it."""

    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in groups with a title."""

    groups: tuple[tuple[str, tuple[Finding, ...]], ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all groups."""
        return tuple(finding for _, findings in self.groups for finding in findings)

    def names(self, state: State) -> list[str]:
        """Names of the findings in this state."""
        return [finding.name for finding in self.findings if finding.state is state]

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name."""
        return next(finding for finding in self.findings if finding.name == name)

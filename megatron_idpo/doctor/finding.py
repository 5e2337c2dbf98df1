"""What the doctor says: findings, and a report of them.

A finding is one thing that was looked at: what is there, what that means for a run, what to do.
Looking is done in `libraries.py`, `machine.py` and `run_config.py`; showing in `main.py`.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a finding bears on running here."""

    OK = "ok"
    NOTE = "note"
    """It runs; there is something to know."""

    MISSING = "missing"
    """An optional piece is not there; `Finding.meaning` says what that costs."""

    BROKEN = "broken"
    """Nothing that needs it can run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """`Transformer Engine`, `layout`, …"""

    state: State

    found: str
    """What is there: a version, an amount, `not installed`."""

    meaning: str = ""
    """What follows from it: what is lost without it, why it breaks."""

    remedy: str = ""
    """What to do, where there is something to do."""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in groups with a title."""

    groups: tuple[tuple[str, tuple[Finding, ...]], ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding, whatever its group."""
        return tuple(finding for _, findings in self.groups for finding in findings)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What prevents running here; empty means that it can run."""
        return tuple(finding for finding in self.findings if finding.state is State.BROKEN)

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name."""
        return next(finding for finding in self.findings if finding.name == name)

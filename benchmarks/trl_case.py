"""Input and output of both sides of `compare_trl.py` and `bf16_learning.py`, and their clock.

A side is a process: it reads a `Case`, trains, and answers with `Measured`. `Clock` takes times and
peak memory alike on both sides.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

type TokenPair = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers: both sides put adapters on them."""

SEED = 0
BETA = 0.1
INTERMEDIATE_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training run, with the settings of each side."""

    model: str
    """A Hugging Face directory with its tokenizer."""

    records: str
    """A jsonl file in training order."""

    adapter: str
    """The PEFT adapter to start from."""

    max_length: int
    dtype: str
    """`fp32` or `bf16`."""

    layers: tuple[int, ...] = ()
    """Intermediate layers; empty is plain DPO."""

    batch_pairs: int = 8
    epochs: int = 1
    rank: int = 16
    lr: float = 5e-4
    threads: int = 2
    side: dict[str, Any] = field(default_factory=dict)
    """Settings of the side that reads it; described there."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a case from `write`'s file."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "layers": tuple(fields["layers"])})

    def write(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(kw_only=True)
class Measured:
    """The measurements of a side."""

    losses: list[float]
    """Loss of each step, averaged over its pairs."""

    margins: list[float]
    """Reward margin of each step, averaged over its pairs."""

    step_ends_s: list[float]
    """End of each step; the first one is warm-up."""

    step_ends_cpu_s: list[float]
    """The same in CPU time, summed over threads."""

    tokens: list[str]
    """`digest` of each step's pairs, from the tokens that the model received."""

    positions: int
    """Positions of all steps in one forward pass, including padding."""

    start_peak_bytes: int
    """Peak resident memory before the first step."""

    train_peak_bytes: int
    """Peak resident memory from the first step on."""

    before_bytes: int
    """Resident memory right before the first step: libraries, weights, optimizer."""

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory of the process."""
        return max(self.start_peak_bytes, self.train_peak_bytes)

    def pairs_per_s(self, batch_pairs: int) -> float:
        """From the end of the first step to the end of the last one."""
        return _rate(self.step_ends_s, batch_pairs)

    def pairs_per_cpu_s(self, batch_pairs: int) -> float:
        """The same per second of CPU time, which other load on the machine affects less."""
        return _rate(self.step_ends_cpu_s, batch_pairs)


def digest(pairs: Iterable[TokenPair]) -> str:
    """A hash of the pairs of a step, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(pairs)).encode()).hexdigest()[:16]


def _rate(ends_s: list[float], batch_pairs: int) -> float:
    return (len(ends_s) - 1) * batch_pairs / (ends_s[-1] - ends_s[0])


class Clock:
    """Times of steps, and resident memory before and during them (Linux)."""

    def __init__(self) -> None:
        """Start without steps."""
        self._ends_s: list[float] = []
        self._ends_cpu_s: list[float] = []
        self._before_bytes = self._start_peak_bytes = 0

    def start(self) -> None:
        """Call right before the first step: resets the peak."""
        self._start_peak_bytes = _status_bytes("VmHWM")
        self._before_bytes = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def step_done(self) -> None:
        """Call after every step."""
        self._ends_s.append(time.perf_counter())
        self._ends_cpu_s.append(time.process_time())

    def measured(
        self, *, losses: list[float], margins: list[float], tokens: list[str], positions: int
    ) -> Measured:
        """All measurements."""
        return Measured(
            losses=losses,
            margins=margins,
            step_ends_s=self._ends_s,
            step_ends_cpu_s=self._ends_cpu_s,
            tokens=tokens,
            positions=positions,
            start_peak_bytes=self._start_peak_bytes,
            train_peak_bytes=_status_bytes("VmHWM"),
            before_bytes=self._before_bytes,
        )


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")

"""What `compare_trl.py` gives both sides, and what it wants back: its own module for all three.

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
    """One thing to train, and how each side may go about it."""

    model: str
    """A Hugging Face directory with its tokenizer."""

    records: str
    """A jsonl file, in the order in which pairs are met."""

    adapter: str
    """The PEFT adapter to start from."""

    max_length: int
    dtype: str
    """`fp32` or `bf16`."""

    layers: tuple[int, ...] = ()
    """Intermediate layers; empty is plain DPO."""

    batch_pairs: int = 8
    rank: int = 16
    lr: float = 5e-4
    threads: int = 2
    side: dict[str, Any] = field(default_factory=dict)
    """Settings of the side that reads it; see there."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """A case that `write` has written."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "layers": tuple(fields["layers"])})

    def write(self, path: Path) -> None:
        """Keep it for another process."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(kw_only=True)
class Measured:
    """What a side answers."""

    losses: list[float]
    """Of each step, averaged over its pairs."""

    step_ends_s: list[float]
    """When each step was over; the first one warms up."""

    step_ends_cpu_s: list[float]
    """The same in CPU time, all threads added up."""

    tokens: list[str]
    """`digest` of each step's pairs, as the model was given them."""

    positions: int
    """Positions that went through the layers in one forward pass of all steps, padding included."""

    start_peak_bytes: int
    """Most resident memory before the first step."""

    train_peak_bytes: int
    """Most resident memory from the first step on."""

    before_bytes: int
    """Resident memory right before the first step: libraries, weights, optimizer."""

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of the whole process."""
        return max(self.start_peak_bytes, self.train_peak_bytes)

    def pairs_per_s(self, batch_pairs: int) -> float:
        """From the end of the first step to the end of the last one."""
        return _rate(self.step_ends_s, batch_pairs)

    def pairs_per_cpu_s(self, batch_pairs: int) -> float:
        """The same per second of CPU time, which others on the machine disturb less."""
        return _rate(self.step_ends_cpu_s, batch_pairs)


def digest(pairs: Iterable[TokenPair]) -> str:
    """A name for the pairs of a step, whatever their order in it."""
    return hashlib.sha256(json.dumps(sorted(pairs)).encode()).hexdigest()[:16]


def _rate(ends_s: list[float], batch_pairs: int) -> float:
    return (len(ends_s) - 1) * batch_pairs / (ends_s[-1] - ends_s[0])


class Clock:
    """Times of steps, and resident memory before and during them, as Linux counts it."""

    def __init__(self) -> None:
        """Nothing has run."""
        self._ends_s: list[float] = []
        self._ends_cpu_s: list[float] = []
        self._before_bytes = self._start_peak_bytes = 0

    def start(self) -> None:
        """To be called right before the first step: from here on a new peak is counted."""
        self._start_peak_bytes = _status_bytes("VmHWM")
        self._before_bytes = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def step_done(self) -> None:
        """To be called after every step."""
        self._ends_s.append(time.perf_counter())
        self._ends_cpu_s.append(time.process_time())

    def measured(self, *, losses: list[float], tokens: list[str], positions: int) -> Measured:
        """Everything together."""
        return Measured(
            losses=losses,
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

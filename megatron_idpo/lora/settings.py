"""What LoRA is asked for: rank, scale, dropout, and which projections get an adapter.

Names and meanings are PEFT's. Projections have Hugging Face's names, though megatron-core fuses
some of them: each gets an adapter of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idpo.errors import ConfigError, Problem

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear of a layer, in the order of the forward pass."""

ALL_LINEAR = "all-linear"
"""PEFT's word for all of them."""

_SUFFIX = "_proj"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters: the output of a projection W becomes `W x + scaling * B A dropout(x)`.

    Raises:
        ConfigError: on construction, naming everything that is wrong with the values.
    """

    rank: int = 16
    """Rows of A and columns of B."""

    alpha: float = 16.0
    """An adapter's output is scaled by `alpha / rank`."""

    dropout: float = 0.0
    """Probability of zeroing an element of A's input in training; a mask for each projection."""

    targets: tuple[str, ...] = PROJECTIONS
    """Some of `PROJECTIONS`; `resolve_targets` makes it of what users write."""

    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead (rank-stabilised LoRA)."""

    seed: int = 0
    """Of the adapters' initial values."""

    def __post_init__(self) -> None:
        """Check the values."""
        if found := self._problems():
            raise ConfigError.of(found)

    @property
    def scaling(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def _problems(self) -> list[Problem]:
        found = []
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            found.append(Problem("lora.rank", f"is {self.rank!r}", "use a whole number from 1"))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            found.append(Problem("lora.alpha", f"is {self.alpha!r}", "use a number above 0"))
        if not 0 <= self.dropout < 1:
            message = f"is {self.dropout!r}"
            found.append(Problem("lora.dropout", message, "use a number from 0 to below 1"))
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            message = f"is {list(self.targets)!r}"
            remedy = f"name some of {', '.join(PROJECTIONS)}, each once"
            found.append(Problem("lora.targets", message, remedy))
        return found


def resolve_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """The projections that a user means, in the order of `PROJECTIONS`.

    Args:
        targets: `all-linear`, or projections as `q_proj` or `q`.

    Raises:
        ConfigError: naming every unknown or repeated target.
    """
    if targets == ALL_LINEAR:
        return PROJECTIONS
    named = [targets] if isinstance(targets, str) else list(targets)
    full = [name if name in PROJECTIONS else f"{name}{_SUFFIX}" for name in named]
    found = []
    for given, name in zip(named, full, strict=True):
        if name not in PROJECTIONS:
            remedy = f"name some of {', '.join(PROJECTIONS)}, or write {ALL_LINEAR}"
            found.append(Problem("lora.targets", f"there is no linear {given!r}", remedy))
    for name in sorted({name for name in full if full.count(name) > 1}):
        found.append(Problem("lora.targets", f"{name} is named twice", "name it once"))
    if not named:
        remedy = f"name some, or write {ALL_LINEAR}; leave the section out to train all weights"
        found.append(Problem("lora.targets", "is empty", remedy))
    if found:
        raise ConfigError.of(found)
    return tuple(name for name in PROJECTIONS if name in full)

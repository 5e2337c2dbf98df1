"""The section `lora`: rank, scale, dropout, and which projections get an adapter.

Names and meanings are PEFT's. Projections have Hugging Face's names, although megatron-core fuses
some of them: each projection gets its own adapter.
"""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Strict

from megatron_idpo.config.section import Bool, PathText, PositiveFloat, PositiveInt, Section
from megatron_idpo.errors import Problem

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
"""Every linear of a layer, in the order of the forward pass."""

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""PEFT's name for all of them."""


def _as_targets(value: Any) -> Any:
    """A list as a tuple of known names; pydantic would report an error in a union twice."""
    if value == ALL_LINEAR:
        return value
    if isinstance(value, list | tuple) and all(name in PROJECTIONS for name in value):
        return tuple(value)
    raise ValueError(f"give {ALL_LINEAR}, or a list of {', '.join(PROJECTIONS)}")


LoraTargets = Annotated[
    Literal["all-linear"] | tuple[Projection, ...], BeforeValidator(_as_targets)
]


class LoraConfig(Section):
    """Low-rank adapters (LoRA); without this section all weights are trained."""

    rank: PositiveInt = 16
    """Rank r of every adapter."""

    alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by alpha / rank."""

    dropout: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters; off in evaluation and for the reference."""

    targets: LoraTargets = ALL_LINEAR
    """Which projections get an adapter, by Hugging Face's names (`[q_proj, v_proj]`)."""

    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""

    adapter: PathText | None = None
    """A PEFT adapter directory to start from; null starts where the adapter changes nothing. The
    reference is the base model without it."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The targets, in the order of `PROJECTIONS`."""
        if self.targets == ALL_LINEAR:
            return PROJECTIONS
        return tuple(name for name in PROJECTIONS if name in self.targets)

    @property
    def scaling(self) -> float:
        """The factor of an adapter's output: W x + scaling · B A dropout(x)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def problems(self) -> list[Problem]:
        """Targets that name no projection, or one twice."""
        if self.targets == ():
            remedy = "name projections, or leave the section out to train all weights"
            return [Problem("targets", "names no projection", remedy)]
        if self.targets != ALL_LINEAR and len(set(self.targets)) < len(self.targets):
            twice = next(name for name in self.targets if self.targets.count(name) > 1)
            return [Problem("targets", f"names {twice} twice", "name it once")]
        return []

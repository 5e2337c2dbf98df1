"""The section `lora`: rank, scale, dropout, and which projections get an adapter.

Names and meanings are PEFT's. Projections have Hugging Face's names, although megatron-core fuses
some of them: each projection gets its own adapter.
"""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, Strict

from megatron_idpo.config.layout import ModelShape
from megatron_idpo.config.section import Bool, Fp32, PathText, PositiveFloat, PositiveInt, Section

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
"""Every linear of a layer, in the order of the forward pass."""

ATTENTION: tuple[Projection, ...] = PROJECTIONS[:4]

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""PEFT's name for all of them. Experts are not linear modules in Transformers, so that in a mixture
of experts these are the attention's."""


def _as_targets(value: Any) -> Any:
    """A list as a tuple of known names; pydantic would report an error in a union twice."""
    if value == ALL_LINEAR:
        return value
    if isinstance(value, list | tuple) and all(name in PROJECTIONS for name in value):
        if 0 < len(value) == len(set(value)):
            return tuple(value)
    raise ValueError(f"give {ALL_LINEAR}, or a list of {', '.join(PROJECTIONS)}, each once")


LoraTargets = Annotated[
    Literal["all-linear"] | tuple[Projection, ...], BeforeValidator(_as_targets)
]


class LoraConfig(Section):
    """Low-rank adapters (LoRA); without this section all weights are trained."""

    rank: PositiveInt = 16
    """Rank r of every adapter."""

    alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by alpha / rank."""

    dropout: Annotated[float, Strict(), Field(ge=0, lt=1), Fp32] = 0.0
    """Dropout before the adapters; off in evaluation and for the reference."""

    targets: LoraTargets = ALL_LINEAR
    """Which projections get an adapter, by Hugging Face's names (`[q_proj, v_proj]`); with experts,
    `all-linear` is the attention."""

    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""

    adapter: PathText | None = None
    """A PEFT adapter directory to start from; null starts where the adapter changes nothing. The
    reference is the base model without it."""

    def for_model(self, model: ModelShape) -> Self:
        """These settings with the targets that `all-linear` means for a model."""
        if self.targets == ALL_LINEAR and model.num_experts:
            return self.model_copy(update={"targets": ATTENTION})
        return self

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

"""The section `lora`: rank, scale, dropout, and which projections get an adapter.

Names and meanings are PEFT's. Projections have Hugging Face's names, although megatron-core fuses
some of them: each projection gets its own adapter.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, Strict

from megatron_idpo.config.layout import ModelShape
from megatron_idpo.config.section import (
    Bool,
    Distinct,
    Fp32,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_idpo.errors import Problem

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
"""Every linear of a layer, in the order of the forward pass."""

ATTENTION: tuple[Projection, ...] = PROJECTIONS[:4]

ExpertParameter = Literal["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_PARAMETERS: tuple[ExpertParameter, ...] = get_args(ExpertParameter)
"""The weights of a layer's experts, by their names in Transformers, in the order of the forward
pass. Each is one tensor with all experts."""

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""PEFT's name for all of them. Experts are not linear modules in Transformers, so that in a mixture
of experts these are the attention's."""


_TARGETS_REMEDY = f"give {ALL_LINEAR}, or a list of {', '.join(PROJECTIONS)}, each once"


def _as_targets(value: Any) -> Any:
    """A list as a tuple of known names; pydantic would report an error in a union twice."""
    if value == ALL_LINEAR:
        return value
    if isinstance(value, list | tuple) and all(name in PROJECTIONS for name in value):
        if len(value) == len(set(value)):
            return tuple(value)
    raise ValueError(_TARGETS_REMEDY)


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

    target_parameters: Annotated[tuple[ExpertParameter, ...], Distinct] = ()
    """Which weights of the experts get an adapter in each expert, as PEFT names them; one or both
    of `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`."""

    gate_up_rank: PositiveInt | None = None
    """Rank of `mlp.experts.gate_up_proj`, with the scale of the others; null: `rank`. PEFT takes
    twice the rank if its `target_modules` name gate and up projections of experts."""

    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""

    adapter: PathText | None = None
    """A PEFT adapter directory to start from; null starts where the adapter changes nothing. The
    reference is the base model without it."""

    def problems(self) -> Iterator[Problem]:
        """Settings that PEFT cannot express."""
        if not self.targets and not self.target_parameters:
            yield Problem("targets", "is ()", _TARGETS_REMEDY)
        if self.gate_up_rank is not None and EXPERT_PARAMETERS[0] not in self.target_parameters:
            message = f"is {self.gate_up_rank}"
            remedy = f"add {EXPERT_PARAMETERS[0]} to lora.target_parameters, or leave it out"
            yield Problem("gate_up_rank", message, remedy)
        if self.gate_up_rank is not None and self.rslora:
            message = f"is {self.gate_up_rank} with lora.rslora, whose scale depends on the rank"
            yield Problem("gate_up_rank", message, "leave one of them out")
        if self.target_parameters and self.dropout:
            message = f"is {self.dropout:g} with lora.target_parameters"
            remedy = "PEFT has no dropout for experts: set it to 0"
            yield Problem("dropout", message, remedy)

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
    def expert_parameters(self) -> tuple[ExpertParameter, ...]:
        """The adapted weights of experts, in the order of `EXPERT_PARAMETERS`."""
        return tuple(name for name in EXPERT_PARAMETERS if name in self.target_parameters)

    def rank_of(self, name: str) -> int:
        """The rank of one of `names`."""
        return (self.gate_up_rank or self.rank) if name == EXPERT_PARAMETERS[0] else self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that gets an adapter, as PEFT names it."""
        return (*self.projections, *self.expert_parameters)

    @property
    def scaling(self) -> float:
        """The factor of an adapter's output: W x + scaling · B A dropout(x)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

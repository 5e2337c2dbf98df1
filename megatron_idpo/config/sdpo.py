"""The section `sdpo`: how pairs are split over the steps, and what differs between steps.

Pairs are split in `sdpo/split.py`; `sdpo_steps.py` derives the configuration of each step.
"""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.objective import Layers
from megatron_idpo.config.section import (
    Bool,
    Int,
    NonEmpty,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from megatron_idpo.errors import Problem

_SHARE_TOLERANCE = 1e-6
"""Tolerance of a sum of fractions: 1/3 has no exact decimal."""


class SdpoStepConfig(Section):
    """One step: its share of the pairs, and values that replace those of other sections."""

    sources: Annotated[tuple[PositiveInt, ...], NonEmpty] | None = None
    """Which sources of `data.train` it trains on, counted from 1; in every step or in none."""

    fraction: PositiveFloat | None = None
    """Its share of the pairs; in every step (they sum to 1), or in none, for equal shares."""

    lr: PositiveFloat | None = None
    """Replaces `optimizer.lr`."""

    warmup_steps: Int | None = None
    """Replaces `optimizer.warmup_steps`."""

    epochs: PositiveInt | None = None
    """Replaces `training.epochs`."""

    max_steps: PositiveInt | None = None
    """Replaces `training.max_steps`."""

    beta: PositiveFloat | None = None
    """Replaces `objective.beta`."""

    layers: Layers | None = None
    """Replaces `objective.layers`."""

    intermediate_weight: Weight | None = None
    """Replaces `objective.intermediate_weight`."""

    layout: Layout | None = None
    """Replaces the whole section `layout`, for the same number of processes."""

    export: Bool = False
    """Also export this step's model for Transformers, to `OUTPUT/step-N/hf`."""


class SdpoConfig(Section):
    """Stepwise DPO: each step trains on a part of the pairs, with the step before as reference."""

    steps: Annotated[tuple[SdpoStepConfig, ...], NonEmpty]
    """Every step in order; `{}` is a step without overrides."""

    order: Literal["given", "easy_to_hard", "random"] = "given"
    """Order of the pairs before they are split over the steps: that of `data.train`; first those
    that the initial model already ranks correctly; or shuffled by `data.seed`."""

    by: Literal["source", "pair"] = "source"
    """With `easy_to_hard`: order whole sources, one for each step, or single pairs."""

    measure: Literal["accuracy", "margin"] = "accuracy"
    """With `easy_to_hard`: accuracy is the share of pairs where the first model gives the chosen
    answer the higher log-probability; margin is the mean difference of log-probabilities."""

    length_normalised: Bool = False
    """With `easy_to_hard`: compare log-probabilities per token of the answer."""

    target: Literal["previous", "first"] = "previous"
    """The model that each step's policy starts from: the previous step's result, or the first."""

    adapters: Literal["merge", "carry"] = "merge"
    """With LoRA, between steps: merge the adapters into the weights and start new ones, or carry
    them on and leave the weights of the first model unchanged."""

    only: PositiveInt | None = None
    """Run only this step; the steps before it must be complete. null runs all incomplete steps."""

    keep_snapshots: Literal["all", "last"] = "all"
    """Which snapshots to keep: all, or only that of the newest complete step."""

    keep_checkpoints: Bool = False
    """Keep a step's training checkpoints, with optimizer state, after its snapshot is written."""

    used_with: ClassVar = dict.fromkeys(
        ("by", "measure", "length_normalised"), ("order", "easy_to_hard")
    )

    def problems(self) -> Iterator[Problem]:
        """Steps that contradict each other or the fields that split the pairs."""
        count = len(self.steps)
        if self.only is not None and self.only > count:
            message = f"is {self.only}, but there are {count} steps"
            yield Problem("only", message, f"give a number from 1 to {count}")
        for name in ("sources", "fraction"):
            without = [n for n, step in enumerate(self.steps) if getattr(step, name) is None]
            if without and len(without) < count:
                message = f"sets no {name}, but other steps do"
                yield Problem(f"steps.{without[0]}", message, f"set {name} in all or none")
        if self.names_sources and self.order != "given":
            message = f"are named by steps, but order is {self.order}"
            remedy = "leave them out, or set order to given"
            yield Problem("steps.0.sources", message, remedy)
        fractions = [step.fraction for step in self.steps if step.fraction is not None]
        if fractions and self.names_sources:
            message = "has no effect: steps name their sources"
            yield Problem("steps.0.fraction", message, "keep one of them")
        elif fractions and self.takes_whole_sources:
            message = "has no effect: each step gets a whole source"
            yield Problem("steps.0.fraction", message, "leave it out, or set by to pair")
        elif fractions and not math.isclose(sum(fractions), 1, abs_tol=_SHARE_TOLERANCE):
            yield Problem(
                "steps", f"the fractions sum to {sum(fractions):.9g}", "make them sum to 1"
            )

    @property
    def names_sources(self) -> bool:
        """Whether steps name the sources that they train on."""
        return any(step.sources is not None for step in self.steps)

    @property
    def takes_whole_sources(self) -> bool:
        """Whether each step gets one source, from easy to hard."""
        return self.order == "easy_to_hard" and self.by == "source"

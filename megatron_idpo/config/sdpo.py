"""The section of stepwise DPO: how pairs are dealt to the steps, and what differs between steps.

Fields only; pairs are dealt in `sdpo/slices.py`, and `config_steps.py` makes each step's
configuration of the whole one.
"""

from typing import Literal

from megatron_idpo.config.objective import Layers
from megatron_idpo.config.sections import (
    Bool,
    Int,
    LayoutConfig,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from megatron_idpo.errors import Problem

_SHARE_TOLERANCE = 1e-6
"""Of a sum of fractions: 1/3 is not written exactly."""


class SdpoStepConfig(Section):
    """One step: its share of the pairs, and what it does otherwise than the rest of the file."""

    sources: tuple[PositiveInt, ...] | None = None
    """Which of `data.train` it learns from, counted from 1; in every step or in none."""

    fraction: PositiveFloat | None = None
    """Its share of the pairs; in every step, with 1 as their sum, or in none, for equal shares."""

    lr: PositiveFloat | None = None
    """Instead of `optimizer.lr`."""

    warmup_steps: Int | None = None
    """Instead of `optimizer.warmup_steps`."""

    epochs: PositiveInt | None = None
    """Instead of `training.epochs`."""

    max_steps: PositiveInt | None = None
    """Instead of `training.max_steps`."""

    beta: PositiveFloat | None = None
    """Instead of `objective.beta`."""

    layers: Layers | None = None
    """Instead of `objective.layers`."""

    intermediate_weight: Weight | None = None
    """Instead of `objective.intermediate_weight`."""

    layout: LayoutConfig | None = None
    """Instead of the section `layout`, as a whole; over as many processes."""

    export: Bool = False
    """Also leave this step's model for Transformers, in `OUTPUT/step-N/hf`."""


class SdpoConfig(Section):
    """Stepwise DPO: each step learns from some pairs, with the step before as its reference."""

    steps: tuple[SdpoStepConfig, ...]
    """Every step in order; `{}` is one without anything of its own."""

    order: Literal["given", "easy_to_hard", "random"] = "given"
    """How pairs are lined up before they are dealt out: as `data.train` lists them; those first
    that the first model gets right already; or shuffled by `data.seed`."""

    by: Literal["source", "pair"] = "source"
    """With `easy_to_hard`: line up whole sources, one for each step, or single pairs."""

    measure: Literal["accuracy", "margin"] = "accuracy"
    """With `easy_to_hard`: the share of pairs whose chosen answer the first model finds likelier,
    or the mean difference of log-probabilities; a single pair has 0 or 1, or its own."""

    length_normalised: Bool = False
    """With `easy_to_hard`: compare log-probabilities per token of the answers."""

    target: Literal["previous", "first"] = "previous"
    """What each step's policy starts from: the previous step's result, or the first model."""

    adapters: Literal["merge", "carry"] = "merge"
    """With LoRA, between steps: merge the adapters into the weights and start fresh ones, or go on
    with them, the first model staying as it is."""

    only: PositiveInt | None = None
    """Run this step alone, where those before it are complete; null runs all that are not."""

    keep_snapshots: Literal["all", "last"] = "all"
    """Which steps' snapshots stay: all, or only the newest that is complete."""

    keep_checkpoints: Bool = False
    """Keep a step's training checkpoints, optimizer state included, when its snapshot is there."""

    def problems(self) -> list[Problem]:
        """Steps that contradict each other, and fields that the others leave unread."""
        found = []
        if not self.steps:
            found.append(Problem("steps", "is empty", "write one entry per step, or {}"))
        if self.only is not None and self.only > len(self.steps):
            message = f"is {self.only}, but there are {len(self.steps)} steps"
            found.append(Problem("only", message, f"give a number from 1 to {len(self.steps)}"))
        found += self._share_problems()
        if self.order != "easy_to_hard":
            for name in ("by", "measure", "length_normalised"):
                because, remedy = f"order is {self.order}", "set order to easy_to_hard"
                found += self._unread(name, because, remedy)
        return found

    @property
    def deals_sources(self) -> bool:
        """Whether steps name the sources that they learn from."""
        return any(step.sources is not None for step in self.steps)

    @property
    def takes_whole_sources(self) -> bool:
        """Whether each step gets one source, in the order of their easiness."""
        return self.order == "easy_to_hard" and self.by == "source"

    def _share_problems(self) -> list[Problem]:
        found = []
        for name in ("sources", "fraction"):
            with_it = [getattr(step, name) is not None for step in self.steps]
            if any(with_it) and not all(with_it):
                lacking = with_it.index(False)
                message = f"says no {name}, which other steps say"
                found.append(Problem(f"steps.{lacking}", message, f"say {name} in all or in none"))
        if self.deals_sources and self.order != "given":
            message = f"are named by steps, but order is {self.order}"
            found.append(
                Problem("steps.0.sources", message, "leave them out, or set order to given")
            )
        found += [
            Problem(f"steps.{index}.sources", "names no source", "name at least one")
            for index, step in enumerate(self.steps)
            if step.sources == ()
        ]
        fractions = [step.fraction for step in self.steps if step.fraction is not None]
        if fractions and self.deals_sources:
            message = "would not be read: steps name their sources"
            found.append(Problem("steps.0.fraction", message, "keep one of them"))
        elif fractions and self.takes_whole_sources:
            message = "would not be read: each step gets a whole source"
            found.append(Problem("steps.0.fraction", message, "leave it out, or set by to pair"))
        elif fractions and abs(sum(fractions) - 1) > _SHARE_TOLERANCE:
            message = f"the fractions are {sum(fractions):g} in sum"
            found.append(Problem("steps", message, "make them 1 in sum"))
        return found

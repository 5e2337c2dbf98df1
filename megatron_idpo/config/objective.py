"""The sections that say what is learnt: the objective, LoRA, the reference.

Fields only; what they mean is computed in `objective/`, `lora/` and `reference/`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from megatron_idpo.config.sections import (
    Bool,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.objective.settings import Objective


def _as_layers(value: Any) -> Any:
    """A list as a tuple, so that the section stays immutable; `resolve_layers` judges numbers."""
    if isinstance(value, list):
        value = tuple(value)
    if value == "all" or (isinstance(value, tuple) and all(map(_is_number, value))):
        return value
    if isinstance(value, dict) and set(value) == {"every"} and _is_number(value["every"]):
        return value
    raise ValueError('give a list of layer numbers or depth fractions, {every: n} or "all"')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Layers = Annotated[
    Literal["all"] | tuple[int | float, ...] | dict[str, int], BeforeValidator(_as_layers)
]


class ObjectiveConfig(Section):
    """The loss: Eq. 1 to 3 and their variants (docs/how_it_works.md)."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"] = "sigmoid"
    """The function of policy and reference log-ratios, by TRL's names; `sigmoid` is DPO."""

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""

    label_smoothing: NonNegativeFloat = 0.0
    """The assumed share of pairs whose labels are swapped, below 0.5."""

    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, at every layer."""

    layers: Layers = ()
    """Intermediate layers that have a loss of their own: numbers from 1, fractions of the depth
    (0.69), `{every: 4}` or `all`; `[]` is plain DPO."""

    intermediate_weight: Weight = 0.1
    """Share w of the intermediate layers in the loss; the final layer has 1 - w. Read where there
    are `layers`."""

    layer_weights: tuple[PositiveFloat, ...] | None = None
    """One weight per intermediate layer, made to sum to 1; null weighs them equally."""

    reference_layer: Literal["same", "final"] = "same"
    """Where the reference of an intermediate layer is read: at that layer, or at the final one."""

    norm: Literal["final", "none"] = "final"
    """Whether intermediate layers are read through the final norm."""

    def problems(self) -> list[Problem]:
        """What the objective itself refuses, and fields that plain DPO does not read."""
        found = []
        try:
            self.objective()
        except ConfigError as error:
            found = [
                Problem(
                    problem.location.removeprefix("objective."), problem.message, problem.remedy
                )
                for problem in error.problems
            ]
        if self.layers == ():
            because, remedy = "there are no intermediate layers", "name some in objective.layers"
            for name in ("layer_weights", "reference_layer", "norm"):
                found += self._unread(name, because, remedy)
            if self.intermediate_weight != 0.0:
                found += self._unread("intermediate_weight", because, remedy)
        return found

    def objective(self) -> Objective:
        """The validated value that the plugin works with.

        Raises:
            ConfigError: naming every field that cannot be.
        """
        names = Objective.__dataclass_fields__
        return Objective(**{name: getattr(self, name) for name in names})


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _as_targets(value: Any) -> Any:
    """A list as a tuple of known names; pydantic would tell a mistake in a union twice."""
    if value == "all-linear":
        return value
    known = get_args(LoraTarget)
    if isinstance(value, list | tuple) and all(name in known for name in value):
        return tuple(value)
    raise ValueError(f"give all-linear, or a list of {', '.join(known)}")


LoraTargets = Annotated[
    Literal["all-linear"] | tuple[LoraTarget, ...], BeforeValidator(_as_targets)
]


class LoraConfig(Section):
    """Low-rank adapters (LoRA); without this section all weights are trained."""

    rank: PositiveInt = 16
    """Rank r of every adapter."""

    alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by alpha / rank."""

    dropout: NonNegativeFloat = 0.0
    """Dropout before the adapters, below 1; off in evaluation and for the reference."""

    targets: LoraTargets = "all-linear"
    """Which projections get an adapter, by Hugging Face's names (`[q_proj, v_proj]`)."""

    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""

    adapter: PathText | None = None
    """A PEFT adapter directory to start from; null starts where the adapter changes nothing. The
    reference is the base model without it."""

    def problems(self) -> list[Problem]:
        """Values that mean no adapter."""
        found = []
        if self.dropout >= 1:
            found.append(Problem("dropout", f"is {self.dropout}", "it must be below 1"))
        if self.targets == ():
            remedy = "name projections, or leave the section out to train all weights"
            found.append(Problem("targets", "names no projection", remedy))
        twice = [name for name in self.targets if self.targets.count(name) > 1]
        if self.targets != "all-linear" and twice:
            found.append(Problem("targets", f"names {twice[0]} twice", "name it once"))
        return found


class ReferenceConfig(Section):
    """Where the reference's log-probabilities come from."""

    source: Literal["cache", "adapter_off", "resident", "offloaded", "none"] = "cache"
    """`cache`: computed once, before the first step, and kept (docs/reference.md). `adapter_off`:
    the model without its adapters, one more forward pass in every step (LoRA). `resident`: a frozen
    copy of the reference, in memory. `offloaded`: such a copy in the host's memory, copied in for
    its passes. `none`: no reference, its log-probabilities count as 0. The reference is
    `model.path`, without `lora.adapter`; in sDPO it is the step before."""

    cache: PathText | None = None
    """Directory of the cache; null is `reference` in `training.output`."""

    def problems(self) -> list[Problem]:
        """Fields that the others leave unread."""
        if self.source == "cache":
            return []
        return self._unread("cache", f"source is {self.source}", "set source to cache")

"""The sections `objective` and `reference`: the loss, its layers, and what it is compared to.

What the values mean is computed in `objective/` and `reference/`.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, Strict, WithJsonSchema

from megatron_idpo.config.section import (
    Bool,
    Fp32,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    Section,
    Weight,
    suggest,
)
from megatron_idpo.errors import ConfigError, Problem

LossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
"""TRL's names; docs/losses.md has the formulas."""

LOSSES: tuple[str, ...] = get_args(LossName)

SMOOTHED = ("sigmoid", "robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired")
"""Losses that label smoothing is defined for."""

OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft")
"""Losses that f-divergences are defined for: an f-divergence adds β log Z(x) to the reward of both
answers, which cancels in their difference only. `sft` has no reward."""

SORTED = ("aot", "aot_unpaired")
"""Losses that compare sorted values of a whole global batch."""


def _as_loss(value: Any) -> Any:
    """A name, or a list of names as a tuple."""
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        # Methods have similar names: bco_unpaired is not aot_unpaired.
        raise ValueError(suggest(str(unknown[0] if unknown else ""), LOSSES, "values", 0.9))
    if len(set(names)) < len(names):
        raise ValueError("name each loss once; loss_weights has their weights")
    return names if isinstance(value, list | tuple) else value


Loss = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_as_loss),
    WithJsonSchema({"anyOf": [{"enum": [*LOSSES]}, {"type": "array", "items": {"type": "them"}}]}),
]


def _as_layers(value: Any) -> Any:
    """A list as a tuple, so that the section is immutable; `resolve_layers` checks the values."""
    if isinstance(value, list):
        value = tuple(value)
    if value == "all" or (isinstance(value, tuple) and all(map(_is_number, value))):
        return value
    if isinstance(value, dict) and set(value) == {"every"} and _is_number(value["every"]):
        return value
    raise ValueError('give a list of layer numbers or depth fractions, {every: n} or "all"')


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < _MAX_LAYER  # false for NaN


_MAX_LAYER = 1 << 16
"""No model is this deep; layer numbers stay small where they are formatted and compared."""


Layers = Annotated[
    Literal["all"] | tuple[int | float, ...] | dict[str, int],
    BeforeValidator(_as_layers),
    WithJsonSchema({"type": "list of layers, {every: n}, or `all`"}),
]


class Objective(Section):
    """The loss: Eq. 1 to 3 and their variants (docs/how_it_works.md)."""

    loss: Loss = "sigmoid"
    """The function of policy and reference log-ratios, by TRL's names (docs/losses.md); `sigmoid`
    is DPO. A list is a weighted sum, as in MPO: `[sigmoid, bco_pair, sft]`."""

    loss_weights: tuple[PositiveFloat, ...] | None = None
    """One weight per loss of a list, not normalized; null weighs each by 1."""

    beta: PositiveFloat = 0.1
    """β: how strongly the policy is held to the reference (τ in IPO)."""

    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5), Fp32] = 0.0
    """ε: the assumed share of pairs whose labels are swapped."""

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """The divergence that holds the policy to the reference (f-DPO, arXiv 2309.16240); DPO's is
    `reverse_kl`. For losses of the difference of two rewards."""

    f_alpha: NonNegativeFloat = 0.5
    """α of `alpha_divergence`; 1 is `reverse_kl`, and 0 is `forward_kl`."""

    discopop_tau: PositiveFloat = 0.05
    """τ of `discopop`: how sharply it changes from a logistic to an exponential loss."""

    wpo: Bool = False
    """Weigh every pair by the policy's probability of its answers (WPO, arXiv 2406.11827). Costs
    one more product with the output layer at every layer that has a loss."""

    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, at every layer."""

    intermediate_weight: Weight = 0.1
    """w of Eq. 3: share of the intermediate layers in the loss; the final layer has 1 - w. Without
    intermediate layers it counts as 0."""

    layer_weights: tuple[PositiveFloat, ...] | None = None
    """One weight per intermediate layer, normalized to sum to 1; null weighs them equally."""

    reference_layer: Literal["same", "final"] = "same"
    """Where the reference of an intermediate layer is read: at that layer, or at the final one."""

    used_with: ClassVar = {"f_alpha": ("f_divergence", "alpha_divergence")}

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses of the sum."""
        return (self.loss,) if isinstance(self.loss, str) else self.loss

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """Each loss with its weight."""
        weights = self.loss_weights or (1.0,) * len(self.losses)
        return tuple(zip(self.losses, weights, strict=True))

    def uses(self, *losses: str) -> bool:
        """Whether one of these losses is in the sum."""
        return not set(losses).isdisjoint(self.losses)

    def problems(self) -> Iterator[Problem]:
        """Contradictions between the losses and their settings."""
        weights = self.loss_weights
        if weights is not None and len(weights) != len(self.losses):
            message = f"{len(weights)} weights for {len(self.losses)} losses"
            yield Problem("loss_weights", message, "give one weight per loss, or leave them out")
        text = " and ".join(self.losses)
        for field, losses in (("label_smoothing", SMOOTHED), ("discopop_tau", ("discopop",))):
            if self._is_set(field) and not self.uses(*losses):
                remedy = f"set loss to {' or '.join(losses)}, or leave it out"
                yield Problem(field, f"has no effect: loss is {text}", remedy)
        if self.uses("exo_pair") and not self.label_smoothing:
            message = "is 0, whose logarithm is a term of exo_pair"
            yield Problem("label_smoothing", message, "set it to 0.001, as its paper does")
        yield from self._undefined()

    def _undefined(self) -> Iterator[Problem]:
        """Combinations that no paper defines; TRL refuses them, or fails."""
        others = [name for name in self.losses if name not in OF_DIFFERENCE]
        if others and self.f_divergence != "reverse_kl":
            message = f"is {self.f_divergence}, which is not defined for {' and '.join(others)}: "
            message += "its term β log Z(x) cancels in the difference of two rewards only"
            remedy = f"use reverse_kl, or the losses {', '.join(OF_DIFFERENCE)}"
            yield Problem("f_divergence", message, remedy)
        if self.wpo and self.uses(*SORTED):
            message = f"is true, but {' and '.join(SORTED)} compare values of different pairs"
            yield Problem("wpo", message, "use another loss: terms there belong to no pair")
        if self.wpo and self.uses("sft"):
            message = "is true, but sft is a mean over tokens, not over pairs"
            yield Problem("wpo", message, "remove sft from the losses, or use nll_weight")

    def layer_scales(self, num_layers: int) -> tuple[float, tuple[float, ...]]:
        """The factors of the layers' losses in Eq. 3: 1 − w, and w·α_l for every layer.

        Args:
            num_layers: K, the number of intermediate layers. 0 is plain DPO: w is 0.

        Returns:
            The final layer's factor and the K others; they sum to 1.

        Raises:
            ConfigError: `layer_weights` does not have K values.
        """
        weights = self.layer_weights
        if weights is not None and len(weights) != num_layers:
            message = f"{len(weights)} weights for {num_layers} layers"
            remedy = "give one weight per intermediate layer, or none for the mean"
            raise ConfigError.at("objective.layer_weights", message, remedy)
        if not num_layers:
            return 1.0, ()
        weights = weights or (1.0,) * num_layers
        total = math.fsum(weights)
        shares = tuple(self.intermediate_weight * weight / total for weight in weights)
        return 1.0 - self.intermediate_weight, shares


class ObjectiveConfig(Objective):
    """The loss: Eq. 1 to 3 and their variants (docs/how_it_works.md)."""

    layers: Layers = ()
    """Intermediate layers with their own loss: numbers from 1, fractions of the depth (0.69),
    `{every: 4}` or `all`; `[]` is plain DPO."""

    norm: Literal["final", "none"] = "final"
    """Whether intermediate layers are read through the final norm."""

    router_aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the experts' load-balancing loss (docs/training.md), for a mixture of experts;
    0 is off."""

    used_with: ClassVar = {
        **Objective.used_with,
        **dict.fromkeys(("layer_weights", "reference_layer", "norm"), ("layers",)),
    }

    def problems(self) -> Iterator[Problem]:
        """Also a weight of layers that do not exist; 0 is allowed."""
        yield from super().problems()
        if self.layers == () and self.intermediate_weight and self._is_set("intermediate_weight"):
            message = "has no effect: there are no intermediate layers"
            yield Problem("intermediate_weight", message, "name some in objective.layers")


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

    used_with: ClassVar = {"cache": ("source", "cache")}

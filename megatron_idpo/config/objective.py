"""The sections `objective` and `reference`: the loss, its layers, and what it is compared to.

What the values mean is computed in `objective/` and `reference/`.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Strict, WithJsonSchema

from megatron_idpo.config.section import (
    Fp32,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    Section,
    Weight,
)
from megatron_idpo.errors import ConfigError, Problem

SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")
"""Losses that label smoothing is defined for."""

PER_TOKEN = ("ipo", "sigmoid_norm")
"""Losses that compare means over a sequence's tokens; the others compare sums."""


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

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"] = "sigmoid"
    """The function of policy and reference log-ratios, by TRL's names; `sigmoid` is DPO."""

    beta: PositiveFloat = 0.1
    """β: how strongly the policy is held to the reference (τ in IPO)."""

    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5), Fp32] = 0.0
    """ε: the assumed share of pairs whose labels are swapped."""

    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, at every layer."""

    intermediate_weight: Weight = 0.1
    """w of Eq. 3: share of the intermediate layers in the loss; the final layer has 1 - w. Without
    intermediate layers it counts as 0."""

    layer_weights: tuple[PositiveFloat, ...] | None = None
    """One weight per intermediate layer, normalized to sum to 1; null weighs them equally."""

    reference_layer: Literal["same", "final"] = "same"
    """Where the reference of an intermediate layer is read: at that layer, or at the final one."""

    used_with: ClassVar = {"label_smoothing": ("loss", *SMOOTHED)}

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

    used_with: ClassVar = {
        **Objective.used_with,
        **dict.fromkeys(("layer_weights", "reference_layer", "norm"), ("layers",)),
    }

    def problems(self) -> Iterator[Problem]:
        """A weight of layers that do not exist; 0 is allowed."""
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

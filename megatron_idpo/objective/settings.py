"""What the loss of a run is, as one validated value: `Objective`.

Numbers and names only; `dpo.py` computes with them. Importing this module loads no torch, so that
a configuration can be judged where torch is broken.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_idpo.errors import ConfigError, Problem

Loss = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"]
ReferenceLayer = Literal["same", "final"]

SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")
"""Losses that label smoothing is defined for."""

PER_TOKEN = ("ipo", "sigmoid_norm")
"""Losses that compare means over a sequence's tokens; the others compare sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which loss, and how layers are weighted. A mistake is a `ConfigError` naming all of them."""

    loss: Loss = "sigmoid"
    """The function of Δ, by TRL's names; `preference_loss` has the formulas."""

    beta: float = 0.1
    """β > 0: how strongly the policy is held to the reference (τ in IPO)."""

    label_smoothing: float = 0.0
    """ε in [0, 0.5): the assumed share of pairs with swapped answers."""

    nll_weight: float = 0.0
    """Weight, >= 0, of the chosen answer's negative log-likelihood per token, at every layer."""

    intermediate_weight: float = 0.1
    """w of Eq. 3, in [0, 1]; without intermediate layers it counts as 0."""

    layer_weights: tuple[float, ...] | None = None
    """One positive weight per intermediate layer, in their order; made to sum to 1. None: mean."""

    reference_layer: ReferenceLayer = "same"
    """Where the reference is read: at the policy's layer, or at its final layer for all."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming every field that cannot be.
        """
        if problems := _problems(self):
            raise ConfigError.of(problems)

    def layer_scales(self, num_layers: int) -> tuple[float, tuple[float, ...]]:
        """What each layer's loss is multiplied by in Eq. 3: 1 − w, and w·α_l for every layer.

        Args:
            num_layers: K, how many intermediate layers there are. 0 is plain DPO: w is 0.

        Returns:
            The final layer's factor and the K others', which sum to 1.

        Raises:
            ConfigError: `layer_weights` are not K.
        """
        weights = self.layer_weights
        if weights is not None and len(weights) != num_layers:
            raise ConfigError.at(
                "objective.layer_weights",
                f"{len(weights)} weights for {num_layers} layers",
                "give one weight per intermediate layer, or none for the mean",
            )
        if not num_layers:
            return 1.0, ()
        weights = weights or (1.0,) * num_layers
        total = math.fsum(weights)
        shares = tuple(self.intermediate_weight * weight / total for weight in weights)
        return 1.0 - self.intermediate_weight, shares


def _problems(objective: Objective) -> list[Problem]:
    """Everything wrong with the fields."""
    found = []

    def check(holds: bool, name: str, message: str, remedy: str) -> None:
        if not holds:
            value = getattr(objective, name)
            found.append(Problem(f"objective.{name}", f"{value!r} {message}", remedy))

    losses, smoothing = get_args(Loss), objective.label_smoothing
    check(objective.loss in losses, "loss", "is no loss", f"choose one of {', '.join(losses)}")
    check(0 < objective.beta < math.inf, "beta", "is not a positive number", "0.1 is common")
    check(
        0 <= smoothing < 0.5,
        "label_smoothing",
        "is not in [0, 0.5)",
        "it is the share of pairs whose labels are wrong; from one half on they say nothing",
    )
    if objective.loss in losses and objective.loss not in SMOOTHED:
        check(
            smoothing == 0,
            "label_smoothing",
            f"has no meaning for the loss {objective.loss}",
            f"set it to 0, or use {', '.join(SMOOTHED)}",
        )
    check(0 <= objective.nll_weight < math.inf, "nll_weight", "is negative or infinite", "0 is off")
    check(
        0 <= objective.intermediate_weight <= 1,
        "intermediate_weight",
        "is not in [0, 1]",
        "it is the share of the intermediate layers in the loss; the final layer has the rest",
    )
    check(
        all(0 < weight < math.inf for weight in objective.layer_weights or ()),
        "layer_weights",
        "are not all positive numbers",
        "leave out a layer that is to count nothing",
    )
    choices = get_args(ReferenceLayer)
    check(
        objective.reference_layer in choices,
        "reference_layer",
        "is no place to read the reference",
        f"choose one of {', '.join(choices)}",
    )
    return found

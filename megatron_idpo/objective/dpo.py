"""Direct preference optimisation at several layers: Eq. 1-3 as tensor functions.

What: the loss of a pair read at one layer (Eq. 1) in DPO's variants, its metrics under TRL's names,
and how the layers' losses become one (Eq. 2 and 3), from sequence log-probabilities. With policy
θ, reference ref, chosen answer w, rejected answer l and

    Δ_l = [log π_l^θ(w|x) − log π_l^ref(w|x)] − [log π_l^θ(l|x) − log π_l^ref(l|x)]

    L_l   = −log σ(β Δ_l)                           Eq. 1
    L_int = Σ_l α_l L_l, Σ α_l = 1 (mean: 1/K)       Eq. 2
    L     = (1 − w) L_final + w L_int                Eq. 3, w = `intermediate_weight`

(intermediate DPO: Kojima 2024, arXiv 2408.02923; DPO: Rafailov et al. 2023, arXiv 2305.18290).

What it does not do: compute log-probabilities, average over a batch, or know where a layer lives.

    P  pairs   2P  their sequences: 2p is pair p's chosen answer, 2p + 1 its rejected one
    K  intermediate layers
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

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


def preference_loss(difference_P: Tensor, objective: Objective) -> Tensor:
    """The loss of a pair as a function of Δ alone, Eq. 1 and its variants.

    sigmoid         −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                 DPO; ε > 0: cDPO (Mitchell 2023)
    sigmoid_norm    the same, of means over tokens                  length-normalised DPO
    robust          [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)    arXiv 2403.00409
    ipo             (Δ − 1/(2β))², of means over tokens             arXiv 2310.12036, Eq. 17
    hinge           max(0, 1 − βΔ)                                  RSO, arXiv 2309.06657

    Args:
        difference_P: Δ, any real; of sums or of means over tokens as the loss wants.
        objective: loss, beta and label_smoothing.

    Returns:
        `[P]`, >= 0 but for `robust`, which is unbiased under swapped labels and may be negative.
    """
    beta, smoothing = objective.beta, objective.label_smoothing
    if objective.loss == "ipo":
        return (difference_P - 1 / (2 * beta)) ** 2
    if objective.loss == "hinge":
        return relu(1 - beta * difference_P)
    as_labelled_P = -(1 - smoothing) * logsigmoid(beta * difference_P)
    if not smoothing:
        return as_labelled_P
    swapped_P = -smoothing * logsigmoid(-beta * difference_P)
    if objective.loss == "robust":
        return (as_labelled_P - swapped_P) / (1 - 2 * smoothing)
    return as_labelled_P + swapped_P


def loss_at_zero(objective: Objective) -> float:
    """`preference_loss` at Δ = 0, where policy and reference are equal: ln 2 for `sigmoid`.

    The chosen answer's likelihood (`nll_weight`) is not part of it; `layer_metrics` has it apart.
    """
    return float(preference_loss(torch.zeros(1, dtype=torch.float64), objective))


def layer_loss(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
) -> Tensor:
    """Eq. 1 at one layer, the final one included: each pair's loss.

    With `nll_weight` λ it is the preference loss plus −λ log π_l(w|x) / |w|: a mean over the tokens
    of *this* answer (RPO: Pang et al. 2024, arXiv 2404.19733, Eq. 1). TRL's likelihood term takes
    the mean over all chosen tokens of a batch instead, so that a pair's loss depends on who else is
    in it; with one pair per batch the two are equal.

    Args:
        policy_logps_2P: log π_l^θ(y|x) of each sequence, sums over its tokens, float, <= 0.
        reference_logps_2P: the reference's, constant. None: no reference, all zeros.
        lengths_2P: tokens of each sequence, >= 1; only losses per token and the NLL read it.
        objective: which loss.

    Returns:
        `[P]`, in the policy's dtype, with a gradient for the policy only.
    """
    ratio_2P = _log_ratio(policy_logps_2P, reference_logps_2P)
    if objective.loss in PER_TOKEN:
        ratio_2P = ratio_2P / lengths_2P
    loss_P = preference_loss(ratio_2P[0::2] - ratio_2P[1::2], objective)
    if objective.nll_weight:
        loss_P = loss_P + objective.nll_weight * _chosen_nll(policy_logps_2P, lengths_2P)
    return loss_P


def layer_metrics(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
) -> dict[str, Tensor]:
    """What a layer says of each pair, under TRL's names.

    Rewards are β times log-ratios of whole sequences, for every loss, as TRL has them; a margin of
    exactly 0 is not accurate.

    Args:
        policy_logps_2P: as for `layer_loss`.
        reference_logps_2P: as for `layer_loss`.
        lengths_2P: as for `layer_loss`.
        objective: as for `layer_loss`.

    Returns:
        `loss`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (0 or
        1), `logps/chosen`, `logps/rejected`, and `nll_loss` (per token, unweighted) where
        `nll_weight` is not 0. Each `[P]` and detached; to be averaged over pairs.
    """
    with torch.no_grad():
        rewards_2P = objective.beta * _log_ratio(policy_logps_2P, reference_logps_2P)
        chosen_P, rejected_P = rewards_2P[0::2], rewards_2P[1::2]
        logps_2P = policy_logps_2P.detach()
        metrics = {
            "loss": layer_loss(policy_logps_2P, reference_logps_2P, lengths_2P, objective),
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
            "rewards/margins": chosen_P - rejected_P,
            "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
            "logps/chosen": logps_2P[0::2],
            "logps/rejected": logps_2P[1::2],
        }
        if objective.nll_weight:
            metrics["nll_loss"] = _chosen_nll(logps_2P, lengths_2P)
        return metrics


def combine(
    final_loss_P: Tensor, intermediate_losses: Sequence[Tensor], objective: Objective
) -> Tensor:
    """Eq. 2 and 3: one loss per pair from all layers'.

    Args:
        final_loss_P: `layer_loss` of the final layer.
        intermediate_losses: of the K intermediate layers, each `[P]`; none is plain DPO.
        objective: the weights.

    Returns:
        `[P]`.

    Raises:
        ConfigError: `layer_weights` are not K.
    """
    final_scale, scales = objective.layer_scales(len(intermediate_losses))
    total_P = final_scale * final_loss_P
    for scale, loss_P in zip(scales, intermediate_losses, strict=True):
        total_P = total_P + scale * loss_P
    return total_P


def _log_ratio(policy_logps_2P: Tensor, reference_logps_2P: Tensor | None) -> Tensor:
    """log π^θ − log π^ref of each sequence."""
    if reference_logps_2P is None:
        return policy_logps_2P
    assert reference_logps_2P.shape == policy_logps_2P.shape, "a reference for every sequence"
    return policy_logps_2P - reference_logps_2P.detach()


def _chosen_nll(policy_logps_2P: Tensor, lengths_2P: Tensor) -> Tensor:
    """−log π(w|x) per token of w, `[P]`."""
    return -policy_logps_2P[0::2] / lengths_2P[0::2]


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

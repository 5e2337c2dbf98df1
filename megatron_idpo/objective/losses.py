"""The losses of a pair, by TRL's names: functions of the answers' log-ratios.

With the log-ratio r(y) = log π_l^θ(y|x) − log π_l^ref(y|x) of an answer at one layer, w and l the
chosen and the rejected answer, s = f'(exp r) the score of an f-divergence (r itself for the reverse
KL divergence of DPO) and Δ = s(w) − s(l):

    sigmoid         −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                 DPO; ε > 0: cDPO (Mitchell 2023)
    sigmoid_norm    the same, of means over tokens                  length-normalized DPO
    robust          [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)    arXiv 2403.00409
    ipo             (Δ − 1/(2β))², of means over tokens             arXiv 2310.12036, Eq. 17
    hinge           max(0, 1 − βΔ)                                  RSO, arXiv 2309.06657
    exo_pair        KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε)             EXO, arXiv 2402.00856, Eq. 16
    discopop        logistic and exponential loss, mixed by σ(βΔ/τ) arXiv 2406.08414, Eq. 5
    nca_pair        −log σ(βr_w) − ½ log σ(−βr_w) − ½ log σ(−βr_l)  NCA, arXiv 2402.05369
    bco_pair        −log σ(βr_w) − log σ(−βr_l)                     BCO without its shift, as in TRL
    sppo_hard       (r_w − 1/(2β))² + (r_l + 1/(2β))²               SPPO, arXiv 2405.00675, Eq. 4.7
    apo_zero        1 − σ(βr_w) + σ(βr_l)                           APO, arXiv 2408.06266, Eq. 7
    apo_down        σ(βr_w) + 1 − σ(β(r_w − r_l))                   APO, Eq. 8
    aot             sigmoid of sorted log π(w)/π(l), policy against reference
    aot_unpaired    sigmoid of sorted r_w against sorted r_l        AOT, arXiv 2406.05882
    sft             −log π_l^θ(w|x), per token of all chosen answers

`aot` and `aot_unpaired` sort the values of all pairs that they are given, and `sft` divides by the
chosen tokens of the global batch: the other losses of a pair depend on that pair only.

    P  pairs   2P  their answers: 2p is pair p's chosen one, 2p + 1 the rejected one
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from megatron_idpo.config.objective import LOSSES, Objective

_MAX_EXPONENT = 80.0
"""Of the α-divergence, as in TRL: exp(80) is 5e34, below the largest float32."""

_REVERSE_KL = 1e-6
"""|α − 1| below which an α-divergence is the reverse KL divergence, its limit; as in TRL."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The values that the losses of some pairs are functions of, at one layer."""

    policy_2P: Tensor
    """log π_l^θ of each answer, a sum over its tokens."""

    reference_2P: Tensor
    """log π_l^ref, without gradient; zeros without a reference."""

    lengths_2P: Tensor
    """Tokens of each answer."""

    mean_chosen_tokens: float | Tensor
    """Tokens per chosen answer, over all pairs of the global batch."""

    @property
    def ratio_2P(self) -> Tensor:
        """r: how much more likely the policy finds each answer than the reference."""
        return self.policy_2P - self.reference_2P

    def ratios(self) -> tuple[Tensor, Tensor]:
        """r of the chosen and of the rejected answers."""
        return self.ratio_2P[0::2], self.ratio_2P[1::2]

    def difference(self, objective: Objective, *, per_token: bool = False) -> Tensor:
        """Δ, `[P]`; per token: of scores that are divided by the length of their answer."""
        score_2P = _score(self.ratio_2P, objective)
        if per_token:
            score_2P = score_2P / self.lengths_2P
        return score_2P[0::2] - score_2P[1::2]


def _score(ratio_2P: Tensor, objective: Objective) -> Tensor:
    """f'(π^θ/π^ref), from the logarithm of the ratio."""
    alpha = objective.f_alpha
    match objective.f_divergence:
        case "forward_kl":
            return 1 - torch.exp(-ratio_2P)
        case "js_divergence":
            return math.log(2) + logsigmoid(ratio_2P)
        case "alpha_divergence" if abs(alpha - 1) >= _REVERSE_KL:
            exponent_2P = ((alpha - 1) * ratio_2P).clamp(max=_MAX_EXPONENT)
            return (exponent_2P.exp() - 1) / (alpha - 1)
    return ratio_2P


# logsigmoid, not log(sigmoid): exact for large negative values, where sigmoid underflows.


def _logistic(margin_P: Tensor, smoothing: float) -> Tensor:
    """−(1−ε) log σ(margin) − ε log σ(−margin)."""
    as_labeled_P = -(1 - smoothing) * logsigmoid(margin_P)
    return as_labeled_P - smoothing * logsigmoid(-margin_P) if smoothing else as_labeled_P


def _sigmoid(pairs: Pairs, objective: Objective) -> Tensor:
    return _logistic(objective.beta * pairs.difference(objective), objective.label_smoothing)


def _sigmoid_norm(pairs: Pairs, objective: Objective) -> Tensor:
    difference_P = pairs.difference(objective, per_token=True)
    return _logistic(objective.beta * difference_P, objective.label_smoothing)


def _robust(pairs: Pairs, objective: Objective) -> Tensor:
    """The swapped term is subtracted, so that this is unbiased and can be negative."""
    margin_P, smoothing = objective.beta * pairs.difference(objective), objective.label_smoothing
    as_labeled_P = -(1 - smoothing) * logsigmoid(margin_P)
    return (as_labeled_P + smoothing * logsigmoid(-margin_P)) / (1 - 2 * smoothing)


def _ipo(pairs: Pairs, objective: Objective) -> Tensor:
    return (pairs.difference(objective, per_token=True) - 1 / (2 * objective.beta)) ** 2


def _hinge(pairs: Pairs, objective: Objective) -> Tensor:
    return relu(1 - objective.beta * pairs.difference(objective))


def _exo_pair(pairs: Pairs, objective: Objective) -> Tensor:
    margin_P, smoothing = objective.beta * pairs.difference(objective), objective.label_smoothing
    as_labeled_P = margin_P.sigmoid() * (logsigmoid(margin_P) - math.log1p(-smoothing))
    swapped_P = (-margin_P).sigmoid() * (logsigmoid(-margin_P) - math.log(smoothing))
    return as_labeled_P + swapped_P


def _discopop(pairs: Pairs, objective: Objective) -> Tensor:
    margin_P = objective.beta * pairs.difference(objective)
    modulation_P = margin_P / objective.discopop_tau
    # exp(−margin) σ(modulation) in one exponential: infinity times 0 would be NaN.
    exponential_P = (logsigmoid(modulation_P) - margin_P).exp()
    return -logsigmoid(margin_P) * (-modulation_P).sigmoid() + exponential_P


def _nca_pair(pairs: Pairs, objective: Objective) -> Tensor:
    chosen_P, rejected_P = (objective.beta * ratio_P for ratio_P in pairs.ratios())
    return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


def _bco_pair(pairs: Pairs, objective: Objective) -> Tensor:
    chosen_P, rejected_P = (objective.beta * ratio_P for ratio_P in pairs.ratios())
    return -logsigmoid(chosen_P) - logsigmoid(-rejected_P)


def _sppo_hard(pairs: Pairs, objective: Objective) -> Tensor:
    (chosen_P, rejected_P), goal = pairs.ratios(), 0.5 / objective.beta
    return (chosen_P - goal) ** 2 + (rejected_P + goal) ** 2


def _apo_zero(pairs: Pairs, objective: Objective) -> Tensor:
    chosen_P, rejected_P = (objective.beta * ratio_P for ratio_P in pairs.ratios())
    return 1 - chosen_P.sigmoid() + rejected_P.sigmoid()


def _apo_down(pairs: Pairs, objective: Objective) -> Tensor:
    chosen_P, rejected_P = (objective.beta * ratio_P for ratio_P in pairs.ratios())
    return chosen_P.sigmoid() + 1 - (chosen_P - rejected_P).sigmoid()


def _aot(pairs: Pairs, objective: Objective) -> Tensor:
    policy_P, reference_P = (
        logps_2P[0::2] - logps_2P[1::2] for logps_2P in (pairs.policy_2P, pairs.reference_2P)
    )
    return _logistic_of_sorted(policy_P, reference_P, objective)


def _aot_unpaired(pairs: Pairs, objective: Objective) -> Tensor:
    return _logistic_of_sorted(*pairs.ratios(), objective)


def _logistic_of_sorted(upper_P: Tensor, lower_P: Tensor, objective: Objective) -> Tensor:
    """The n-th smallest of `upper_P` against the n-th smallest of `lower_P`.

    Each term is returned at the pair whose `upper_P` it has.
    """
    upper_P, order_P = upper_P.sort(stable=True)
    margin_P = objective.beta * (upper_P - lower_P.sort().values)
    return _logistic(margin_P, objective.label_smoothing)[order_P.argsort()]


def _sft(pairs: Pairs, objective: Objective) -> Tensor:
    """Its mean over the pairs of the global batch is the mean over their chosen tokens."""
    return -pairs.policy_2P[0::2] / pairs.mean_chosen_tokens


PAIR_LOSSES: Mapping[str, Callable[[Pairs, Objective], Tensor]] = MappingProxyType(
    {
        "sigmoid": _sigmoid,
        "sigmoid_norm": _sigmoid_norm,
        "hinge": _hinge,
        "ipo": _ipo,
        "robust": _robust,
        "exo_pair": _exo_pair,
        "nca_pair": _nca_pair,
        "bco_pair": _bco_pair,
        "sppo_hard": _sppo_hard,
        "aot": _aot,
        "aot_unpaired": _aot_unpaired,
        "apo_zero": _apo_zero,
        "apo_down": _apo_down,
        "discopop": _discopop,
        "sft": _sft,
    }
)
"""Each returns `[P]`."""

assert set(PAIR_LOSSES) == set(LOSSES), "every loss of the configuration has a function"

"""Layer curves: what a model predicts on held-out pairs at every layer, with intervals.

For a pair with chosen answer w and rejected answer l, at every layer and against the reference at
the same layer, with Delta of Eq. 1:

    likelihood     mean of sigma(Delta): Fig. 3 of the intermediate-DPO paper (arXiv 2408.02923)
    margin         mean of Delta: TRL's rewards/margins
    accuracy       share of pairs with Delta > 0; a tie counts half

and of the layer alone, read through the model's own head, without a reference, from mean
log-probabilities per token (sums would depend on the answers' lengths):

    own_accuracy   share of pairs with a more likely chosen answer; a tie counts half
    agreement      correlation over pairs of the layer's own preference, chosen minus rejected,
                   with the final layer's
    nats_per_token cross-entropy of the answers' tokens; chance is the log of the vocabulary size

Shapes: P pairs, L layers, S resampled means, K means, 2 = chosen, rejected.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.reference.logps_table import Logps
from megatron_idpo.train.metrics.intervals import Floats, bootstrap_interval

QUANTITIES = ("likelihood", "margin", "accuracy", "own_accuracy", "agreement", "nats_per_token")
_MEANS = ("likelihood", "margin", "accuracy", "own_accuracy")
"""Quantities that are plain means over pairs."""


class Estimate(NamedTuple):
    """A quantity at every layer: value and 95 % interval, NaN where it is not known."""

    value_L: Floats
    low_L: Floats
    high_L: Floats


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurves:
    """The layer curves of one model."""

    model: str
    layers: tuple[int, ...]
    """Ascending, from 1; the last is the final layer."""

    pairs: int
    prompts: int
    """Distinct prompts: the unit of resampling."""

    chance_nats: float
    """Cross-entropy per token of a uniform distribution: log of the vocabulary size."""

    estimates: Mapping[str, Estimate]
    """By name, in the order of `QUANTITIES`."""

    def __eq__(self, other: object) -> bool:
        """Whether both have the same sample and values; NaN equals NaN."""
        if not isinstance(other, LayerCurves) or self.format_sample != other.format_sample:
            return False
        return all(
            np.array_equal(estimate, other.estimates[name], equal_nan=True)
            for name, estimate in self.estimates.items()
        )

    @property
    def format_sample(self) -> str:
        """`213 held-out pairs of 40 prompts`."""
        pairs = "1 held-out pair" if self.pairs == 1 else f"{self.pairs:,} held-out pairs"
        return f"{pairs} of {self.prompts:,} prompt{'s' if self.prompts > 1 else ''}"

    @property
    def is_reference(self) -> bool:
        """Whether the model equals the reference at every layer within rounding."""
        margin_L = self.estimates["margin"].value_L
        distance_L = np.abs(self.estimates["likelihood"].value_L - _TIED)
        return bool(max(np.abs(margin_L).max(), distance_L.max()) < _NO_GAIN)


_TIED = 0.5
"""sigma(0)"""

_NO_GAIN = 1e-5
"""Mean margins below this are rounding in fp32 of equal models."""

_SAME = 1e-6
"""Relative difference below which log-probabilities count as equal: another layout or packing
changes as much in fp32."""


def layer_curves(
    model: str,
    policy_PL2: Logps,
    reference_PL2: Logps,
    answer_tokens_P2: NDArray[np.integer],
    prompt_P: NDArray[np.int64],
    *,
    vocab_size: int,
    beta: float,
    samples: int,
    seed: int,
) -> LayerCurves:
    """Curves of a model from sequence log-probabilities.

    Args:
        model: its name.
        policy_PL2: of the model, sums over tokens, float32 [P, L, 2].
        reference_PL2: of the reference.
        answer_tokens_P2: tokens of the answers, [P, 2], above 0.
        prompt_P: index of each pair's prompt.
        vocab_size: of the model.
        beta: of Eq. 1.
        samples: resamples of prompts for intervals.
        seed: of resampling.
    """
    assert policy_PL2.shape == reference_PL2.shape, (policy_PL2.shape, reference_PL2.shape)
    num_layers = policy_PL2.shape[1]
    means_PK = _columns(policy_PL2, reference_PL2, answer_tokens_P2, beta)

    def statistic(means_SK: Floats) -> Floats:
        return _quantities(means_SK, num_layers)

    values = statistic(means_PK.mean(axis=0, keepdims=True))
    bounds = bootstrap_interval(means_PK, prompt_P, samples=samples, seed=seed, statistic=statistic)
    by_name = np.concatenate([values, bounds]).reshape(3, len(QUANTITIES), num_layers)
    return LayerCurves(
        model,
        tuple(range(1, num_layers + 1)),
        len(policy_PL2),
        len(np.unique(prompt_P)),
        math.log(vocab_size),
        {name: Estimate(*by_name[:, location]) for location, name in enumerate(QUANTITIES)},
    )


def prompt_indices(prompts: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """The index of each pair's prompt; equal prompt tokens have equal indices."""
    indices: dict[bytes, int] = {}
    return np.array([indices.setdefault(p.tobytes(), len(indices)) for p in prompts], np.int64)


def _columns(
    policy_PL2: Logps, reference_PL2: Logps, answer_tokens_P2: NDArray[np.integer], beta: float
) -> Floats:
    """Values per pair whose means determine all quantities.

    [P, K] in this order: 4 L of `_MEANS`; L own preferences x; L of x²; L of x·y, y being the final
    layer's x; L log-probabilities of both answers together; 1 their number of tokens.
    """
    policy, reference = policy_PL2.astype(np.float64), reference_PL2.astype(np.float64)
    ratio_PL2 = policy - reference
    delta_PL = beta * (ratio_PL2[..., 0] - ratio_PL2[..., 1])
    per_token_PL2 = policy / answer_tokens_P2[:, None, :]
    own_PL = per_token_PL2[..., 0] - per_token_PL2[..., 1]
    rounding_PL = _SAME * np.abs(reference).sum(axis=2)
    own_rounding_PL = _SAME * np.abs(per_token_PL2).sum(axis=2)
    return np.column_stack(
        [
            0.5 * (1 + np.tanh(delta_PL / 2)),  # sigma, without overflow
            delta_PL,
            _share(delta_PL, beta * rounding_PL),
            _share(own_PL, own_rounding_PL),
            own_PL,
            own_PL**2,
            own_PL * own_PL[:, -1:],
            policy.sum(axis=2),
            answer_tokens_P2.sum(axis=1),
        ]
    )


def _share(values: Floats, rounding: Floats) -> Floats:
    """1 where positive, 1/2 where it may be rounding, else 0."""
    return (np.sign(np.where(np.abs(values) <= rounding, 0.0, values)) + 1) / 2


def _quantities(means_SK: Floats, num_layers: int) -> Floats:
    """`QUANTITIES` of every layer from means: [S, 6 L]."""
    tokens_S1 = means_SK[:, -1:]
    parts = np.split(means_SK[:, :-1], range(num_layers, means_SK.shape[1] - 1, num_layers), axis=1)
    own, squares, products, logps = parts[len(_MEANS) :]
    variance = squares - own**2
    covariance = products - own * own[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        agreement = covariance / np.sqrt(variance * variance[:, -1:])
    # Without variance the correlation is undefined; what was computed above is rounding.
    is_flat = variance <= _ROUNDING * squares
    agreement[is_flat | is_flat[:, -1:]] = np.nan
    return np.concatenate([*parts[: len(_MEANS)], agreement, -logps / tokens_S1], axis=1)


_ROUNDING = 1e-12
"""A variance below this share of the mean square is rounding of float64."""

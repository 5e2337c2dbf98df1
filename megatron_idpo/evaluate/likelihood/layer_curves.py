"""What a model makes of held-out pairs at every layer, as curves with intervals.

For a pair with chosen answer w and rejected answer l, at every layer and against the reference at
the same layer, with Delta of Eq. 1:

    likelihood     mean of sigma(Delta): Fig. 3 of the intermediate-DPO paper (arXiv 2408.02923)
    margin         mean of Delta: TRL's rewards/margins
    accuracy       share of pairs with Delta > 0; a tie counts half

and of the layer by itself, read through the model's own head, without a reference, from mean
log-probabilities per token (sums would tell which answer is longer):

    own_accuracy   share of pairs whose chosen answer it finds likelier; a tie counts half
    agreement      correlation over pairs of its own preference, chosen minus rejected, with the
                   final layer's
    nats_per_token how badly it predicts the answers' tokens; chance is the log of the vocabulary

Shapes: P pairs, L layers, S samples of means, K means, 2 = chosen, rejected.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.evaluate.intervals import Floats, bootstrap_interval
from megatron_idpo.reference.cache_files import Logps

QUANTITIES = ("likelihood", "margin", "accuracy", "own_accuracy", "agreement", "nats_per_token")
_MEANS = ("likelihood", "margin", "accuracy", "own_accuracy")
"""Quantities that are plain means over pairs."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """One quantity at every layer: its value and a 95 % interval, NaN where it is not known."""

    value_L: Floats
    low_L: Floats
    high_L: Floats


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurves:
    """All quantities of one model."""

    model: str
    layers: tuple[int, ...]
    """Ascending, from 1; the last is the final layer."""

    pairs: int
    prompts: int
    """Different ones: what is resampled."""

    chance_nats: float
    """What a token costs where all words are as likely: log of the vocabulary's size."""

    estimates: Mapping[str, Estimate]
    """By name, in the order of `QUANTITIES`."""

    @property
    def format_sample(self) -> str:
        """`213 held-out pairs of 40 prompts`."""
        pairs = "1 held-out pair" if self.pairs == 1 else f"{self.pairs:,} held-out pairs"
        return f"{pairs} of {self.prompts:,} prompt{'s' if self.prompts > 1 else ''}"

    @property
    def is_reference(self) -> bool:
        """Whether it is no further than the reference at any layer, but for rounding."""
        margin_L = self.estimates["margin"].value_L
        distance_L = np.abs(self.estimates["likelihood"].value_L - _TIED)
        return bool(max(np.abs(margin_L).max(), distance_L.max()) < _NO_GAIN)


_TIED = 0.5
"""sigma(0)"""

_NO_GAIN = 1e-5
"""Mean margins below this are what rounding in fp32 makes of equal models."""

_SAME = 1e-6
"""Log-probabilities that differ by less than this share of themselves are equal: what another
layout or another packing changes in fp32."""


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
        model: what it is called.
        policy_PL2: the model's, every layer, float32 [P, L, 2].
        reference_PL2: the reference's, likewise.
        answer_tokens_P2: tokens of the answers, [P, 2], above 0.
        prompt_P: which prompt each pair is of.
        vocab_size: words that a token can be.
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


def prompt_numbers(prompts: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Pairs with the same prompt tokens have the same number."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(p.tobytes(), len(numbers)) for p in prompts], np.int64)


def _columns(
    policy_PL2: Logps, reference_PL2: Logps, answer_tokens_P2: NDArray[np.integer], beta: float
) -> Floats:
    """What is averaged over pairs: for each layer `_MEANS`, then what correlations and rates need.

    [P, K]: K = 4 L means; L own preferences x, L of x², L of x·y with y the final layer's x; L log-
    probabilities of both answers; the tokens of both.
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
    """1 where positive, a half where it may be rounding, else 0."""
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
    # Where all pairs are alike there is no correlation, and rounding would make one up.
    is_flat = variance <= _ROUNDING * squares
    agreement[is_flat | is_flat[:, -1:]] = np.nan
    return np.concatenate([*parts[: len(_MEANS)], agreement, -logps / tokens_S1], axis=1)


_ROUNDING = 1e-12
"""A variance below this share of the mean square is rounding of float64."""

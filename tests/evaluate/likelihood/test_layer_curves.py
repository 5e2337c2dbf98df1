"""Layer curves of synthetic log-probabilities with known results."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves, layer_curves, prompt_indices

PAIRS, NUM_LAYERS = 40, 3


def curves(
    policy_PL2: NDArray[Any], reference_PL2: NDArray[Any], tokens_P2: Any = None, **settings: Any
) -> LayerCurves:
    pairs = len(policy_PL2)
    return layer_curves(
        "made up",
        policy_PL2.astype(np.float32),
        reference_PL2.astype(np.float32),
        np.full((pairs, 2), 10) if tokens_P2 is None else tokens_P2,
        np.arange(pairs),
        **{"vocab_size": 320, "beta": 0.1, "samples": 200, "seed": 0, **settings},
    )


@pytest.fixture
def logps_PL2() -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(-60, 15, (PAIRS, NUM_LAYERS, 2))


def test_margin_is_beta_times_the_gain(logps_PL2: NDArray[Any]) -> None:
    """The chosen answer gains 3 nats at layer 2: sigma(0.3), accuracy 1; ties at other layers."""
    policy_PL2 = logps_PL2.copy()
    policy_PL2[:, 1, 0] += 3.0
    found = curves(policy_PL2, logps_PL2).estimates
    np.testing.assert_allclose(found["margin"].value_L, [0, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(found["likelihood"].value_L, [0.5, 0.574443, 0.5], atol=1e-6)
    assert list(found["accuracy"].value_L) == [0.5, 1.0, 0.5]
    assert list(found["accuracy"].high_L) == [0.5, 1.0, 0.5]


def test_own_accuracy_compares_means_per_token(logps_PL2: NDArray[Any]) -> None:
    """Twice the length at twice the nats is a tie per token, though not in sums."""
    tokens_P2 = np.tile([10, 20], (PAIRS, 1))
    logps_PL2[..., 1] = 2 * logps_PL2[..., 0]
    logps_PL2[:, 2, 1] -= 1.0
    found = curves(logps_PL2, logps_PL2, tokens_P2).estimates
    assert list(found["own_accuracy"].value_L) == [0.5, 0.5, 1.0]
    nats = -logps_PL2.sum((0, 2)) / tokens_P2.sum()
    np.testing.assert_allclose(found["nats_per_token"].value_L, nats, rtol=1e-6)


def test_agreement_is_the_correlation_with_the_final_layer(logps_PL2: NDArray[Any]) -> None:
    logps_PL2[:, 0, 0] = logps_PL2[:, 0, 1] + 5  # layer 1: the same for every pair
    logps_PL2[:, 1] = logps_PL2[:, 2, ::-1]  # layer 2: the opposite of the final layer
    found = curves(logps_PL2, logps_PL2).estimates["agreement"]
    assert np.isnan(found.value_L[0])
    np.testing.assert_allclose(found.value_L[1:], [-1, 1], atol=1e-6)


def test_intervals_contain_the_value_and_shrink_with_more_pairs(logps_PL2: NDArray[Any]) -> None:
    random = np.random.default_rng(4)
    more_PL2 = random.normal(-60, 15, (16 * PAIRS, NUM_LAYERS, 2))
    few = curves(logps_PL2 + random.normal(0, 3, logps_PL2.shape), logps_PL2).estimates
    many = curves(more_PL2 + random.normal(0, 3, more_PL2.shape), more_PL2).estimates
    for name in few:
        assert (few[name].low_L <= few[name].value_L).all(), name
        assert (few[name].value_L <= few[name].high_L).all(), name
    widths = [np.ptp([e["margin"].low_L, e["margin"].high_L], axis=0) for e in (few, many)]
    assert (widths[1] < 0.5 * widths[0]).all()


def test_rounding_counts_as_a_tie(logps_PL2: NDArray[Any]) -> None:
    policy_PL2 = logps_PL2.copy()
    policy_PL2[:, 0, 0] += 2e-5  # of about -60: as another packing changes
    policy_PL2[:, 1, 0] += 2e-3
    found = curves(policy_PL2, logps_PL2)
    assert list(found.estimates["accuracy"].value_L) == [0.5, 1.0, 0.5]
    assert not found.is_reference
    policy_PL2[:, 1] = logps_PL2[:, 1]
    assert curves(policy_PL2, logps_PL2).is_reference


def test_single_prompt_has_no_intervals(logps_PL2: NDArray[Any]) -> None:
    one = curves(logps_PL2[:1] + 1, logps_PL2[:1])
    assert one.format_sample == "1 held-out pair of 1 prompt"
    assert all(np.isnan(estimate.low_L).all() for estimate in one.estimates.values())
    assert np.isnan(one.estimates["agreement"].value_L).all()
    two = curves(logps_PL2[:2] + 1, logps_PL2[:2]).estimates
    assert np.isnan(two["agreement"].low_L).all() and not np.isnan(two["margin"].low_L).any()


def test_huge_margins_do_not_overflow(logps_PL2: NDArray[Any]) -> None:
    policy_PL2 = logps_PL2.copy()
    policy_PL2[:, 0, 0] += 1e6
    policy_PL2[:, 1, 1] += 1e6
    likelihood = curves(policy_PL2, logps_PL2).estimates["likelihood"].value_L
    np.testing.assert_allclose(likelihood, [1, 0, 0.5], atol=1e-9)


def test_prompts_differ_by_all_their_tokens() -> None:
    prompts = [np.array(tokens, np.int32) for tokens in ([1, 2], [1], [1, 2], [2, 1], [1])]
    assert list(prompt_indices(prompts)) == [0, 1, 0, 2, 1]

"""Assignment of pairs to steps: a deterministic partition in the configured shares and order."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.errors import DataError
from megatron_idpo.sdpo.split import Easiness, Indices, split_pairs

ROUNDING = 1e-6
"""Of fractions whose sum is 1 within float64 rounding."""

patient = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])

SHARED: dict[str, dict[str, Any]] = {
    "given": {"order": "given"},
    "random": {"order": "random"},
    "easy_to_hard": {"order": "easy_to_hard", "by": "pair", "measure": "margin"},
    "right_to_wrong": {"order": "easy_to_hard", "by": "pair", "measure": "accuracy"},
}

# Few different margins, for ties.
margins = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=80)
weights = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6)


def section(steps: Sequence[dict[str, Any]], **fields: Any) -> SdpoConfig:
    return SdpoConfig.model_validate({"steps": steps, **fields})


def of_margins(margin_P: Sequence[float]) -> Easiness:
    return Easiness.of(np.array([[margin, 0.0] for margin in margin_P], np.float32))


def split(
    sdpo: SdpoConfig, margin_P: Sequence[float], sources: Sequence[int] = (), seed: int = 0
) -> list[list[int]]:
    """The steps' pairs; all from one source if no sources are given."""
    source_P = np.array(sources or [0] * len(margin_P), np.int64)
    num_sources = int(source_P.max()) + 1
    slices = split_pairs(sdpo, source_P, num_sources, of_margins(margin_P), seed=seed)
    assert all(slice_K.dtype == np.int64 for slice_K in slices)
    return [slice_K.tolist() for slice_K in slices]


@patient
@given(st.sampled_from(sorted(SHARED)), margins, weights, st.booleans(), st.integers(0, 2**40))
def test_shares_are_a_partition(order, margin_P, weighed, are_equal, seed):
    shares = [1 / len(weighed)] * len(weighed)
    steps: list[dict[str, Any]] = [{} for _ in weighed]
    if not are_equal:
        shares = [weight / sum(weighed) for weight in weighed]
        steps = [{"fraction": share} for share in shares]
    sdpo = section(steps, **SHARED[order])
    expected = [share * len(margin_P) for share in shares]
    try:
        slices = split(sdpo, margin_P, seed=seed)
    except DataError as error:
        (problem,) = error.problems
        index = int(problem.location.removeprefix("sdpo.steps."))
        assert expected[index] <= 1 + ROUNDING
        return
    assert sorted(pair for slice_K in slices for pair in slice_K) == list(range(len(margin_P)))
    assert all(slice_K == sorted(slice_K) and slice_K for slice_K in slices)
    for slice_K, count in zip(slices, expected, strict=True):
        assert abs(len(slice_K) - count) <= 1 + ROUNDING
    assert split(sdpo, margin_P, seed=seed) == slices


@patient
@given(st.sampled_from(["margin", "accuracy"]), margins, st.integers(1, 6))
def test_pairs_are_ordered_from_easy_to_hard(measure, margin_P, num_steps):
    """A pair of an earlier step is easier, or equally easy and listed before."""
    assume(num_steps <= len(margin_P))
    sdpo = section([{}] * num_steps, order="easy_to_hard", by="pair", measure=measure)
    slices = split(sdpo, margin_P)
    values = margin_P if measure == "margin" else [float(margin > 0) for margin in margin_P]
    for before, after in pairwise(slices):
        last = max((-values[pair], pair) for pair in before)
        assert last < min((-values[pair], pair) for pair in after)


@patient
@given(margins, st.integers(1, 6))
def test_given_order_is_kept(margin_P, num_steps):
    assume(num_steps <= len(margin_P))
    slices = split(section([{}] * num_steps), margin_P)
    assert [pair for slice_K in slices for pair in slice_K] == list(range(len(margin_P)))


def test_fractions_are_of_all_pairs():
    steps = [{"fraction": share} for share in (0.5, 0.3, 0.2)]
    assert list(map(len, split(section(steps), [1.0] * 10))) == [5, 3, 2]
    assert list(map(len, split(section([{}, {}, {}]), [1.0] * 10))) == [3, 4, 3]


def test_random_order_depends_on_the_seed():
    sdpo = section([{}, {}], order="random")
    orders = [split(sdpo, [1.0] * 40, seed=seed) for seed in range(4)]
    assert len({str(order) for order in orders}) == 4
    assert all(max(first) > 20 for first, _ in orders)


@pytest.mark.parametrize("order", sorted(set(SHARED) - {"random"}))
def test_other_orders_do_not_depend_on_the_seed(order):
    sdpo = section([{}, {}], **SHARED[order])
    margin_P = [1.0, -1.0, 2.0, 0.0, 3.0]
    assert split(sdpo, margin_P, seed=1) == split(sdpo, margin_P, seed=2)


def test_steps_with_named_sources():
    sdpo = section([{"sources": [3, 1]}, {"sources": [2]}, {"sources": [1]}])
    slices = split(sdpo, [1.0] * 6, sources=[0, 1, 2, 0, 1, 2])
    assert slices == [[0, 2, 3, 5], [1, 4], [0, 3]]


@patient
@given(
    st.sampled_from(["margin", "accuracy"]),
    st.integers(1, 5).flatmap(
        lambda count: st.lists(
            st.tuples(st.integers(0, count - 1), st.integers(-4, 4).map(float)),
            min_size=count,
            max_size=60,
        )
    ),
)
def test_whole_sources_are_ordered_by_mean(measure, pairs):
    sources, margin_P = zip(*pairs, strict=True)
    count = max(sources) + 1
    assume(len(set(sources)) == count)
    sdpo = section([{}] * count, order="easy_to_hard", measure=measure)
    slices = split(sdpo, margin_P, sources=sources)
    values = np.array(
        margin_P if measure == "margin" else [margin > 0 for margin in margin_P], float
    )
    means = [values[np.array(sources) == source].mean() for source in range(count)]
    ranked = sorted(range(count), key=lambda source: -means[source])  # stable
    expected = [[p for p, source in enumerate(sources) if source == each] for each in ranked]
    assert slices == expected


def test_accuracy_and_margin_order_sources_differently():
    margin_P, sources = [9.0, -1.0, -1.0, 1.0, 1.0, -1.0], [0, 0, 0, 1, 1, 1]
    by_accuracy = split(section([{}, {}], order="easy_to_hard"), margin_P, sources)
    assert by_accuracy == [[3, 4, 5], [0, 1, 2]]
    by_margin = split(section([{}, {}], order="easy_to_hard", measure="margin"), margin_P, sources)
    assert by_margin == [[0, 1, 2], [3, 4, 5]]


def test_sources_of_equal_accuracy_keep_their_order():
    sdpo = section([{}] * 3, order="easy_to_hard")
    assert split(sdpo, [1.0, 1.0, 1.0], sources=[2, 0, 1]) == [[1], [2], [0]]


def test_margin_per_token_differs_from_whole_answers():
    """A long chosen answer may be less likely as a whole and more likely per token."""
    logps_P2 = np.array([[-20.0, -10.0], [-10.0, -10.0], [-10.0, -20.0]], np.float32)
    lengths_P2 = np.array([[40, 10], [10, 10], [5, 20]], np.int32)
    whole, per_token = Easiness.of(logps_P2), Easiness.of(logps_P2, lengths_P2)
    assert whole.accuracy_P.tolist() == [0, 0, 1]
    assert whole.margin_P.tolist() == [-10, 0, 10]
    assert per_token.accuracy_P.tolist() == [1, 0, 0]
    assert per_token.margin_P.tolist() == [0.5, 0, -1]
    assert logps_P2[0].tolist() == [-20.0, -10.0]
    sdpo = section([{}, {}, {}], order="easy_to_hard", by="pair", measure="margin")
    firsts = [
        [
            slice_K.tolist()
            for slice_K in split_pairs(sdpo, np.zeros(3, np.int64), 1, easiness, seed=0)
        ]
        for easiness in (whole, per_token)
    ]
    assert firsts == [[[2], [1], [0]], [[0], [1], [2]]]


def test_differences_are_in_double_precision():
    logps_P2 = np.array([[-1.0, -16777218.0], [-0.5, -16777218.0]], np.float32)
    assert Easiness.of(logps_P2).margin_P.tolist() == [16777217.0, 16777217.5]


def test_mean_of_a_source_without_pairs_is_nan():
    source_P: Indices = np.array([0, 2, 2])
    means = of_margins([1.0, 3.0, -4.0]).by_source(source_P, 3, "margin")
    assert means[0] == 1 and np.isnan(means[1]) and means[2] == -0.5
    assert of_margins([1.0, 3.0, -4.0]).by_source(source_P, 3, "accuracy")[2] == 0.5


# The section, the pairs' sources, the step without pairs, what to do.
EMPTY: dict[str, tuple[SdpoConfig, list[int], int, str]] = {
    "a small fraction": (
        section([{"fraction": 0.5}, {"fraction": 0.1}, {"fraction": 0.4}]),
        [0, 0, 0, 0],
        1,
        "give it a larger fraction",
    ),
    "more steps than pairs": (section([{}] * 4), [0, 0], 0, "give it a larger fraction"),
    "a named source": (
        section([{"sources": [1]}, {"sources": [2]}, {"sources": [3]}]),
        [0, 2],
        1,
        "leave out the source",
    ),
    "a whole source": (
        section([{}, {}, {}], order="easy_to_hard"),
        [0, 2],
        2,
        "leave out the source",
    ),
}


@pytest.mark.parametrize(("sdpo", "sources", "index", "remedy"), EMPTY.values(), ids=EMPTY)
def test_a_step_without_pairs_is_named(sdpo, sources, index, remedy):
    with pytest.raises(DataError) as raised:
        split(sdpo, [1.0] * len(sources), sources)
    (problem,) = raised.value.problems
    assert problem.location == f"sdpo.steps.{index}"
    assert problem.message == f"gets none of the {len(sources)} pairs"
    assert problem.remedy.startswith(remedy)

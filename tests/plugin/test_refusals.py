"""Every refused setting is refused by name; what `attach` makes of it is in `test_wrong_use.py`."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_idpo.plugin.compatibility import (
    _MUST_BE_OFF,
    refused_chunks,
    refused_recompute,
    refused_settings,
    refused_vocabulary,
)

SIZES = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "add_bias_linear": False}
QUIET = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "normalization": "RMSNorm",
    "cuda_graph_modules": [],
}


def config(**changes):
    made = TransformerConfig(**SIZES, **QUIET)
    for name, value in changes.items():
        assert hasattr(made, name), f"TransformerConfig has no {name}"
        setattr(made, name, value)
    return made


def test_a_plain_configuration_is_not_refused():
    assert refused_settings(config()) == []


REFUSED = [{name: 1 if name == "mtp_num_layers" else True} for name in _MUST_BE_OFF] + [
    {"context_parallel_size": 2},
    {"attention_dropout": 0.1},
    {"hidden_dropout": 0.1},
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "transformer_engine"},
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_a_setting_is_refused_with_place_reason_and_remedy(change):
    (problem,) = refused_settings(config(**change))
    (name,) = change
    assert problem.location == f"TransformerConfig.{name}" and problem.message and problem.remedy


def test_every_name_is_a_setting_of_this_megatron_core():
    """A name that megatron-core has not is one that is never refused."""
    known = {field.name for field in fields(TransformerConfig)}
    asked = {name for change in REFUSED for name in change}
    assert asked <= known
    assert {"batch_p2p_comm", "virtual_pipeline_model_parallel_size"} <= known


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("chunks", [None, 1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_batched_p2p_is_refused_where_two_stages_interleave(stages, chunks, batched):
    changes = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks,
        "batch_p2p_comm": batched,
    }
    problems = refused_settings(config(**changes))
    locations = [problem.location for problem in problems]
    wrong = stages == 2 and chunks == 2 and batched
    assert locations == (["TransformerConfig.batch_p2p_comm"] if wrong else [])


@pytest.mark.parametrize("stages", [1, 2])
def test_a_norm_with_a_bias_cannot_be_copied_to_other_stages(stages):
    changes = {"normalization": "LayerNorm", "pipeline_model_parallel_size": stages}
    assert len(refused_settings(config(**changes))) == stages - 1


def handed_out(layers: list[int], run: int) -> set[int]:
    """What megatron-core's `checkpointed_forward` hands out: the last layer of each run."""
    out, first = set(), 0
    while first < len(layers):
        out.add(layers[min(first + run, len(layers)) - 1])
        first += run
    return out


@given(st.data())
def test_uniform_recomputation_names_exactly_the_layers_it_would_drop(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    run = data.draw(st.integers(1, 7))
    total = sum(sizes)
    taps = data.draw(st.lists(st.integers(1, max(total, 1)), unique=True).map(sorted))
    numbers = iter(range(1, total + 1))
    chunks = [[next(numbers) for _ in range(size)] for size in sizes]
    full = SimpleNamespace(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=run
    )
    problems = refused_recompute(full, taps, chunks)
    kept = set().union(*(handed_out(chunk, run) for chunk in chunks))
    lost = [layer for layer in taps if layer <= total and layer not in kept]
    assert len(problems) == bool(lost)
    for problem in problems:
        assert f"tapped layers {lost}" in problem.message


@pytest.mark.parametrize(
    ("granularity", "method"), [(None, None), ("selective", None), ("full", "block")]
)
def test_other_recomputation_hands_out_every_layer(granularity, method):
    other = SimpleNamespace(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=3
    )
    assert refused_recompute(other, [1], [[1, 2, 3]]) == []


def test_things_that_are_no_chunks():
    for thing in ([], (), object(), None):
        (problem,) = refused_chunks(thing)
        assert problem.location == "chunks" and "list" in problem.remedy


def test_a_vocabulary_may_be_padded_but_not_be_more():
    chunks = [SimpleNamespace(vocab_size=8)]
    assert [len(refused_vocabulary(chunks, size)) for size in (-1, 0, 1, 7, 8, 9)] == [
        1, 1, 0, 0, 0, 1,
    ]  # fmt: skip

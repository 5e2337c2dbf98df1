"""Incompatible settings are reported by name; `docs/how_it_works.md` lists the same ones.

That `attach` raises for them on every rank is tested in `test_user_errors.py`.
"""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_idpo.plugin.compatibility import (
    MUST_BE_OFF,
    check_chunks,
    check_recompute,
    check_settings,
    check_vocabulary,
)

SIZES = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "add_bias_linear": False}
COMPATIBLE = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "normalization": "RMSNorm",
    "cuda_graph_modules": [],
}


def config(**changes):
    config = TransformerConfig(**SIZES, **COMPATIBLE)
    for name, value in changes.items():
        assert hasattr(config, name), f"TransformerConfig has no {name}"
        setattr(config, name, value)
    return config


def test_compatible_configuration_has_no_problems():
    assert check_settings(config()) == []


INCOMPATIBLE = [{name: 1 if name == "mtp_num_layers" else True} for name in MUST_BE_OFF] + [
    {"context_parallel_size": 2},
    {"attention_dropout": 0.1},
    {"hidden_dropout": 0.1},
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "transformer_engine"},
]


@pytest.mark.parametrize("change", INCOMPATIBLE, ids=str)
def test_incompatible_setting_is_reported_with_reason_and_remedy(change):
    (problem,) = check_settings(config(**change))
    (name,) = change
    assert problem.location == f"TransformerConfig.{name}" and problem.message and problem.remedy


def test_checked_names_exist_in_megatron_core():
    """A setting that megatron-core renamed would never be reported."""
    known = {field.name for field in fields(TransformerConfig)}
    checked = {name for change in INCOMPATIBLE for name in change}
    assert checked <= known
    assert {"batch_p2p_comm", "virtual_pipeline_model_parallel_size"} <= known


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("chunks", [None, 1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_batched_p2p_is_reported_only_where_two_stages_interleave(stages, chunks, batched):
    changes = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks,
        "batch_p2p_comm": batched,
    }
    locations = [problem.location for problem in check_settings(config(**changes))]
    is_wrong = stages == 2 and chunks == 2 and batched
    assert locations == (["TransformerConfig.batch_p2p_comm"] if is_wrong else [])


@pytest.mark.parametrize("stages", [1, 2])
def test_layer_norm_is_reported_only_with_several_stages(stages):
    changes = {"normalization": "LayerNorm", "pipeline_model_parallel_size": stages}
    assert len(check_settings(config(**changes))) == stages - 1


def returned_layers(layers: list[int], run: int) -> set[int]:
    """The layers that `checkpointed_forward` returns: the last one of each run."""
    returned, first = set(), 0
    while first < len(layers):
        returned.add(layers[min(first + run, len(layers)) - 1])
        first += run
    return returned


@given(st.data())
def test_uniform_recompute_reports_exactly_the_layers_it_would_drop(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    run = data.draw(st.integers(1, 7))
    total = sum(sizes)
    taps = data.draw(st.lists(st.integers(1, max(total, 1)), unique=True).map(sorted))
    layer_numbers = iter(range(1, total + 1))
    chunks = [[next(layer_numbers) for _ in range(size)] for size in sizes]
    full = SimpleNamespace(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=run
    )
    problems = check_recompute(full, taps, chunks)
    returned = set().union(*(returned_layers(chunk, run) for chunk in chunks))
    lost = [layer for layer in taps if layer <= total and layer not in returned]
    assert len(problems) == bool(lost)
    for problem in problems:
        assert f"tapped layers {lost}" in problem.message


@pytest.mark.parametrize(
    ("granularity", "method"), [(None, None), ("selective", None), ("full", "block")]
)
def test_other_recompute_methods_are_compatible(granularity, method):
    other = SimpleNamespace(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=3
    )
    assert check_recompute(other, [1], [[1, 2, 3]]) == []


@pytest.mark.parametrize(
    "argument",
    [[], (), object(), None],
    ids=["empty list", "empty tuple", "not a sequence", "None"],
)
def test_chunks_must_be_a_non_empty_list(argument):
    (problem,) = check_chunks(argument)
    assert problem.location == "chunks" and "list" in problem.remedy


def test_vocabulary_may_be_padded_but_not_exceed_the_output_layer():
    chunks = [SimpleNamespace(vocab_size=8)]
    counts = {size: len(check_vocabulary(chunks, size)) for size in (-1, 0, 1, 7, 8, 9)}
    assert counts == {-1: 1, 0: 1, 1: 0, 7: 0, 8: 0, 9: 1}


# ---- the table in the documentation --------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.md"


class EverythingOn:
    """A configuration in which every setting has an incompatible value."""

    recompute_granularity = "full"
    recompute_method = "uniform"

    def __getattr__(self, name: str) -> Any:
        return 2


def table_rows() -> list[str]:
    """The rows of the table whose header is `| setting | why |`."""
    (table,) = re.findall(r"^\| setting \| why \|\n(.*?)\n\n", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^\| `.*$", table, re.M)


@pytest.mark.parametrize("name", MUST_BE_OFF)
def test_documentation_has_the_reason_of_each_setting(name):
    assert f"| `{name}` | {MUST_BE_OFF[name]} |" in table_rows()


def test_documentation_lists_exactly_the_incompatible_settings():
    problems = [*check_settings(EverythingOn()), *check_recompute(EverythingOn(), [1], [[1, 2]])]
    reported = {problem.location.removeprefix("TransformerConfig.") for problem in problems}
    listed = {name for row in table_rows() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed - {"none", "uniform", "full"} == reported

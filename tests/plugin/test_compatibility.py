"""Incompatible settings are reported by name; `docs/how_it_works.md` lists the same ones.

That `attach` raises for them on every rank is tested in `test_user_errors.py`.
"""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_idpo.plugin.compatibility import (
    MUST_BE_OFF,
    check_chunks,
    check_expert_bias,
    check_settings,
    check_vocabulary,
    check_wrappers,
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
    {"attention_dropout": 0.1},
    {"hidden_dropout": 0.1},
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "transformer_engine"},
    {"gtp_weight_remat_size": 2},
    {"expert_gtp_weight_remat_size": 2},
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


@pytest.mark.parametrize(
    "coefficient",
    [{"moe_aux_loss_coeff": 0.1}, {"moe_aux_loss_coeff": [0.0, 0.1]}, {"moe_z_loss_coeff": 1e-3}],
    ids=str,
)
def test_auxiliary_losses_that_count_tokens_are_reported_with_losses_per_token(coefficient):
    (problem,) = check_settings(config(calculate_per_token_loss=True, **coefficient))
    assert problem.location == "TransformerConfig.calculate_per_token_loss"
    assert next(iter(coefficient)) in problem.message and "set them to 0" in problem.remedy
    assert check_settings(config(**coefficient)) == []
    assert check_settings(config(calculate_per_token_loss=True)) == []


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


@pytest.mark.parametrize(
    "change",
    [
        {"context_parallel_size": 2},
        {"normalization": "LayerNorm", "pipeline_model_parallel_size": 2},
        {"distribute_saved_activations": True},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    ],
    ids=str,
)
def test_what_is_not_wrong_is_not_refused(change):
    assert check_settings(config(**change)) == []


@pytest.mark.parametrize(
    "argument",
    [[], (), object(), None],
    ids=["empty list", "empty tuple", "not a sequence", "None"],
)
def test_chunks_must_be_a_non_empty_list(argument):
    (problem,) = check_chunks(argument)
    assert problem.location == "chunks" and "list" in problem.remedy


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "TorchFullyShardedDataParallel"])
def test_fsdp_is_reported_by_name_below_other_wrappers(name):
    ddp, fsdp = (type(kind, (), {}) for kind in ("DistributedDataParallel", name))
    chunk, wrapped, sharded = SimpleNamespace(), ddp(), fsdp()
    wrapped.module = sharded.module = chunk
    assert check_wrappers([wrapped]) == []
    wrapped.module = sharded
    (problem,) = check_wrappers([wrapped])
    assert name in problem.message and "DistributedDataParallel" in problem.remedy


def test_vocabulary_may_be_padded_but_not_exceed_the_output_layer():
    chunks = [SimpleNamespace(vocab_size=8)]
    counts = {size: len(check_vocabulary(chunks, size)) for size in (-1, 0, 1, 7, 8, 9)}
    assert counts == {-1: 1, 0: 1, 1: 0, 7: 0, 8: 0, 9: 1}


# ---- frozen routers ------------------------------------------------------------------------------


class Router(torch.nn.Module):
    def __init__(self, *, trains: bool, has_bias: bool, frozen_bias: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=trains)
        self.expert_bias: Any = None
        if has_bias:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(2))
        self.frozen_expert_bias = frozen_bias


@pytest.mark.parametrize(
    ("rate", "router", "is_refused"),
    [
        (1e-3, {"trains": False, "has_bias": True}, True),
        (0.0, {"trains": False, "has_bias": True}, False),
        (1e-3, {"trains": False, "has_bias": True, "frozen_bias": True}, False),
        (1e-3, {"trains": True, "has_bias": True}, False),
        (1e-3, {"trains": False, "has_bias": False}, False),
    ],
)
def test_a_frozen_router_whose_bias_moves_is_refused(rate, router, is_refused):
    chunks: Any = [torch.nn.Sequential(torch.nn.Linear(2, 2), Router(**router))]
    chunks[0].config = SimpleNamespace(moe_router_bias_update_rate=rate)
    problems = check_expert_bias(chunks)
    assert len(problems) == is_refused
    for problem in problems:
        assert "the reference would move" in problem.message and problem.remedy == "set it to 0"


# ---- the table in the documentation --------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.md"


class EverythingOn:
    """A configuration in which every setting has an incompatible value."""

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
    problems = check_settings(EverythingOn())
    reported = {problem.location.removeprefix("TransformerConfig.") for problem in problems}
    listed = {name for row in table_rows() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed - {"none"} == reported

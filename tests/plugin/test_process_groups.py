"""A model whose process groups are not megatron-core's own, on some ranks of the world only."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError

from . import stock_model as stock
from . import stock_run
from . import tiny_megatron as tiny
from .stock_run import BETA, WEIGHT, Case, micro_batches

pytestmark = pytest.mark.distributed

RELATIVE = 1e-5
"""fp32 sums in another order."""

LAYERS, NUM_LAYERS = (1, 3), 4
ALONE = Case()
"""The layout that megatron-core's own groups have: every rank by itself."""


def attached(chunks: list[Any], pg_collection: Any = None) -> Any:
    from megatron_idpo import Objective, attach

    objective = Objective(beta=BETA, intermediate_weight=WEIGHT)
    return attach(
        chunks,
        layers=LAYERS,
        objective=objective,
        vocab_size=stock.VOCAB,
        pg_collection=pg_collection,
    )


def on_one_rank(**overrides: Any) -> dict[str, Tensor]:
    stock_run.start(ALONE)
    chunks = stock.build(Layout(), num_layers=NUM_LAYERS, **overrides)
    dpo = attached(chunks)
    batches = micro_batches((*LAYERS, NUM_LAYERS), ALONE)
    stock_run.run_step(dpo, tiny.wrap(dpo, chunks), batches, ALONE)
    return tiny.gradients(chunks)


def pipeline_of(ranks: list[int]) -> Any:
    """The groups of a model with one pipeline stage on each of these ranks; none: on every rank."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups.pp = dist.new_group(ranks) if ranks else alone
    for name in ("tp", "cp", "dp", "dp_cp", "ep", "expt_dp", "expt_tp", "tp_cp", "tp_ep_pp"):
        setattr(groups, name, alone)
    groups.embd = groups.pos_embd = None
    return groups


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}


def experts_on_last_ranks_of_three() -> dict[str, Tensor]:
    """Data and expert parallelism over ranks 1 and 2, in groups that the model alone has."""
    import torch.distributed as dist

    stock_run.start(ALONE)
    groups = pipeline_of([])
    both = dist.new_group([1, 2])
    if not dist.get_rank():
        return {}
    for name in ("dp", "dp_cp", "ep", "tp_ep", "tp_dp_cp", "tp_ep_pp"):
        setattr(groups, name, both)
    layout = Layout(expert=2)
    chunks = stock.build(layout, num_layers=NUM_LAYERS, pg_collection=groups, **EXPERTS)
    return gradients_of_step(chunks, groups, part_of_step(dist.get_rank() - 1, Case(data=2)))


def on_last_ranks_of_three() -> dict[str, Tensor]:
    """Two stages on ranks 1 and 2. Rank 0 calls nothing of the plugin."""
    import torch.distributed as dist

    stock_run.start(ALONE)  # data parallelism over three ranks, which the model does not use
    groups = pipeline_of([1, 2])
    return step_of_stage(groups) if dist.get_rank() else {}


def step_of_stage(groups: Any) -> dict[str, Tensor]:
    """Gradients of a step on this stage."""
    chunks = stock.build(Layout(pipeline=2), num_layers=NUM_LAYERS, pg_collection=groups)
    return gradients_of_step(chunks, groups, part_of_step())


def gradients_of_step(chunks: list[Any], groups: Any, batches: list[Any]) -> dict[str, Tensor]:
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    dpo = attached(chunks, groups)
    config = chunks[0].config
    config.finalize_model_grads_func = dpo.finalize_model_grads
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(), chunks[0], pg_collection=groups
    )

    def forward_step(iterator: Any, model: Any) -> Any:
        batch, inputs = next(iterator)
        return dpo.forward(model, batch, **inputs), partial(dpo.loss, batch)

    with dpo.collect_outputs(len(batches)) as outputs:
        log = get_forward_backward_func(pp_size=groups.pp.size())(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=stock_run.POSITIONS,
            micro_batch_size=stock_run.SEQUENCES,
            forward_only=False,
            p2p_communicator=P2PCommunicator(groups.pp, config),
            pg_collection=groups,
        )
    if groups.pp.size() == 1:
        return tiny.gradients(chunks)
    assert {output.layer for output in outputs} == ({1} if dist.get_rank() == 1 else {3, 4})
    if log:
        table = torch.stack([part["layer 1 loss"] for part in log]).sum(dim=0)
        assert table[1] == stock_run.PAIRS and table[0] > 0, "of the other stage"
    return tiny.gradients(chunks)


def part_of_step(data_rank: int = 0, case: Case = ALONE) -> list[Any]:
    """A data-parallel rank's micro-batches, independent of megatron-core's own ranks."""
    from unittest.mock import patch

    with patch("megatron.core.parallel_state.get_data_parallel_rank", lambda: data_rank):
        return micro_batches((*LAYERS, NUM_LAYERS), case)


def test_a_model_on_some_ranks_has_the_gradients_of_one_rank(workers):
    (expected,) = workers.run(on_one_rank, 1)
    nothing, *stages = workers.run(on_last_ranks_of_three, 3)
    check(nothing, stages, expected)


def test_experts_on_some_ranks_have_the_gradients_of_one_rank(workers):
    (expected,) = workers.run(on_one_rank, 1, **EXPERTS)
    nothing, *ranks = workers.run(experts_on_last_ranks_of_three, 3)
    assert all(any(f"experts.{n}." in name for name in expected) for n in range(4))
    check(nothing, ranks, expected)


def check(nothing: Any, stages: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    gradients = tiny.merged(stages)
    assert nothing == {} and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        relative = (gradients[name] - gradient).norm() / gradient.norm()
        assert relative <= RELATIVE, f"{name}: {relative:.1e}"


def incomplete() -> list[str]:
    """Collections that lack groups which could only be guessed."""
    from megatron_idpo.mcore.parallel.groups import ModelGroups

    def message(pg_collection: Any) -> str:
        try:
            ModelGroups.of(pg_collection)
        except ConfigError as error:
            return str(error)
        return "no error"

    before = message(None)
    stock_run.start(ALONE)
    groups = pipeline_of([0])
    del groups.dp_cp
    own = message(None)
    foreign = message(groups)
    return [before, own, foreign]


def test_groups_that_could_only_be_guessed_are_an_error(workers):
    ((before, own, foreign),) = workers.run(incomplete, 1)
    assert "lacks tp, pp, cp, dp_cp; " in before and "initialize_model_parallel" in before
    assert own == "no error"
    assert "pg_collection: lacks dp_cp, and has groups that are not megatron-core's own" in foreign
    assert "set its tp, pp, cp, dp_cp" in foreign

"""Pipeline stages: the last one, groups of stages, and a batch through the schedule."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError
from tests.plugin import tiny_megatron as tiny

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("world", "device", "needs_group", "is_refused"),
    [
        (3, "cuda:0", True, True),
        (3, None, True, False),
        (2, "cuda:0", True, False),
        (3, "cuda:0", False, False),
    ],
)
def test_a_model_on_some_ranks_is_refused_where_new_groups_are_split_from_the_world(
    monkeypatch, world, device, needs_group, is_refused
):
    from torch.distributed import distributed_c10d

    from megatron_idpo.mcore.parallel import pipeline

    gathered = [(rank, ((1, 2), True, needs_group)) for rank in (1, 2)]
    groups: Any = SimpleNamespace(pipeline=None, gather=lambda own: gathered)
    group = SimpleNamespace(bound_device_id=device)
    created: list[Any] = []
    for owner, name, value in (
        (pipeline.dist, "get_process_group_ranks", [1, 2]),
        (pipeline.dist, "get_rank", 1),
        (pipeline.dist, "get_world_size", world),
        (distributed_c10d, "_get_default_group", group),
    ):
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    monkeypatch.setattr(pipeline, "create_group", created.append)
    raises = pytest.raises(ConfigError, match=r"device_id.*was called with cuda:0")
    with raises if is_refused else nullcontext():
        pipeline.stage_group(groups, is_member=True, needs_group=needs_group)
    assert created == ([] if is_refused or not needs_group else [(1, 2)])


def last_stage(layout: Layout) -> tuple[bool, float]:
    """Whether this rank has the last stage, and the broadcast rank number of the last stage."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.mcore.parallel.pipeline import broadcast_from_last_stage, is_last_stage

    start_layout(layout)
    own_rank = torch.tensor(float(dist.get_rank()))
    return is_last_stage(), broadcast_from_last_stage(own_rank).item()


def test_last_stage_and_its_broadcast(workers):
    assert workers.run(last_stage, 4, Layout(tensor=2, pipeline=2)) == [
        (rank >= 2, float(2 + rank % 2)) for rank in range(4)
    ]
    assert workers.run(last_stage, 2, Layout(tensor=2)) == [(True, 0.0), (True, 1.0)]


def sum_over_stages(members: set[int], users: set[int]) -> tuple[tuple[int, ...], float] | None:
    """The ranks of this rank's group of stages, and the sum of their numbers over it."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import ModelGroups, rank_coordinates, start_layout
    from megatron_idpo.mcore.parallel.pipeline import stage_group

    start_layout(Layout(tensor=2, pipeline=2))
    stage = rank_coordinates().pp_rank
    group = stage_group(ModelGroups.of(), is_member=stage in members, needs_group=stage in users)
    # Every rank has counted as many groups, so later ones have the same names.
    count = torch.ones(1)
    dist.all_reduce(count, group=dist.new_group())
    assert count == dist.get_world_size()
    if group is None:
        return None
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=group.group)
    return group.ranks, total.item()


def test_each_pipeline_gets_a_separate_stage_group(workers):
    """Ranks 0 and 2 are one pipeline, 1 and 3 the other."""
    even, odd = ((0, 2), 2.0), ((1, 3), 4.0)
    assert workers.run(sum_over_stages, 4, {0, 1}, {1}) == [even, odd, even, odd]
    assert workers.run(sum_over_stages, 4, {1}, {1}) == [None, None, ((2,), 2.0), ((3,), 3.0)]
    assert workers.run(sum_over_stages, 4, {0, 1}, set()) == [None] * 4


def scheduled(layout: Layout, training: bool) -> tuple[list[tuple[int, int]], bool, float]:
    """The (chunk, micro-batch) pairs that ran, in order; whether graphs were recorded; and the sum
    of the absolute gradients on this rank."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.parallel.pipeline import run_schedule

    chunks = tiny.start(layout)
    ran: list[tuple[int, int]] = []
    grad_enabled = set()
    rows = [RowParams.plain(tiny.ROW_TOKENS) for _ in range(4)]
    tokens_1T = torch.arange(tiny.ROW_TOKENS)[None]

    def forward_step(iterator: Any, chunk: Any) -> Any:
        index = next(iterator)
        ran.append((chunks.index(chunk), index))
        grad_enabled.add(torch.is_grad_enabled())
        output = chunk(tokens_1T, tokens_1T, None, packed_seq_params=rows[index])
        return output, lambda logits: (logits.float().square().mean(), {})

    before = torch.is_grad_enabled()
    run_schedule(forward_step, range(4), chunks, row_tokens=tiny.ROW_TOKENS, training=training)
    assert torch.is_grad_enabled() == before and len(grad_enabled) == 1
    gradients = [p.grad for chunk in chunks for p in chunk.parameters() if p.grad is not None]
    return ran, grad_enabled.pop(), float(sum(gradient.abs().sum() for gradient in gradients))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)],
    ids=["one", "pipeline", "interleaved"],
)
def test_schedule_runs_every_micro_batch_once_on_every_chunk(workers, layout):
    expected = [(chunk, index) for chunk in range(layout.virtual_pipeline) for index in range(4)]
    for ran, has_graph, grad_sum in workers.run(scheduled, layout.pipeline, layout, False):
        assert sorted(ran) == expected and not has_graph and grad_sum == 0
    for ran, has_graph, grad_sum in workers.run(scheduled, layout.pipeline, layout, True):
        assert sorted(ran) == expected and has_graph and grad_sum > 0

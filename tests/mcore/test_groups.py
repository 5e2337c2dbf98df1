"""A rank's place in the layout, and collectives over parts of the world."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout

pytestmark = pytest.mark.distributed

LAYOUT = Layout(tensor=2, pipeline=2)


def rank(layout: Layout) -> tuple[Any, ...]:
    from megatron_idpo.mcore.parallel.groups import (
        data_parallel_size,
        rank_coordinates,
        start_layout,
        tensor_group,
    )

    start_layout(layout)
    here = rank_coordinates()
    size = tensor_group().size()
    return here.tp_rank, here.tp_size, here.pp_rank, here.dp_rank, data_parallel_size(), size


def test_places(workers):
    """megatron-core's order: tensor first, then data, then pipeline."""
    assert workers.run(rank, 8, LAYOUT) == [
        (rank % 2, 2, rank // 4, rank // 2 % 2, 2, 2) for rank in range(8)
    ]


def last(layout: Layout) -> bool:
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.mcore.parallel.pipeline import is_last_stage

    start_layout(layout)
    return is_last_stage()


def test_the_last_stage(workers):
    assert workers.run(last, 8, LAYOUT) == [False] * 4 + [True] * 4
    assert workers.run(last, 2, Layout(tensor=2)) == [True, True]


def gather(layout: Layout) -> list[list[float]] | None:
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, start_layout

    start_layout(layout)
    rows = torch.full((3, 2), float(dist.get_rank()))
    shards = gather_tensor_shards(rows[:, :1])  # a view with gaps
    return None if shards is None else [shard.flatten().tolist() for shard in shards]


def test_shards_are_gathered_to_the_first_tensor_rank(workers):
    assert workers.run(gather, 4, LAYOUT) == [
        [[0.0] * 3, [1.0] * 3],
        None,
        [[2.0] * 3, [3.0] * 3],
        None,
    ]
    assert workers.run(gather, 2, Layout(pipeline=2)) == [[[0.0] * 3], [[1.0] * 3]]


def stages(taking_part: set[int], needing: set[int]) -> tuple[tuple[int, ...], float] | None:
    """The ranks of this rank's group, and the sum of their numbers over it."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import rank_coordinates, start_layout
    from megatron_idpo.mcore.parallel.pipeline import stage_group

    start_layout(Layout(tensor=2, pipeline=4))
    stage = rank_coordinates().pp_rank
    found = stage_group(is_member=stage in taking_part, needs_group=stage in needing)
    if found is None:
        return None
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=found.group)
    return found.ranks, total.item()


def test_each_pipeline_has_its_group_of_stages(workers):
    """Ranks 0, 2, 4, 6 are one pipeline, the odd ones the other."""
    answers = workers.run(stages, 8, {1, 3}, {1})
    even, odd = ((2, 6), 8.0), ((3, 7), 10.0)
    assert answers == [None, None, even, odd, None, None, even, odd]
    assert workers.run(stages, 8, {1, 3}, set()) == [None] * 8

"""Random numbers are those of (seed, step, place), whatever was drawn before."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout

pytestmark = pytest.mark.distributed


def draws(layout: Layout, *steps: tuple[int, int]) -> list[tuple[list[float], list[float]]]:
    """Of (seed, step): from torch's generator, and from the tracker's of tensor parallelism."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_idpo.mcore.parallel.groups import seed_rng_for_step, start_layout

    start_layout(layout, seed=sum(map(sum, steps)))
    found = []
    for seed, step in steps:
        seed_rng_for_step(seed, step)
        own = torch.rand(4).tolist()
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(4).tolist()
        found.append((own, tracked))
    return found


def different(*values: Any) -> bool:
    return len({str(value) for value in values}) == len(values)


def test_a_step_draws_the_same_whatever_came_before(workers):
    ((first, second, again, other_seed, minus),) = workers.run(
        draws, 1, Layout(), (7, 1), (7, 2), (7, 1), (8, 1), (-3, -2)
    )
    assert first == again
    assert different(*first, *second, *other_seed, *minus)


def test_tensor_ranks_share_torchs_generator_and_nothing_else(workers):
    (one,), (other,) = workers.run(draws, 2, Layout(tensor=2), (7, 1))
    assert one[0] == other[0]
    assert different(one[0], one[1], other[1])


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout()], ids=["stages", "data"])
def test_stages_and_data_ranks_draw_differently(workers, layout):
    (one,), (other,) = workers.run(draws, 2, layout, (7, 1))
    assert different(*one, *other)


def test_all_data_ranks_and_stages_of_all_steps_draw_differently(workers):
    """No stage of one step draws what another stage draws in another step."""
    steps = [(0, step) for step in range(20)]
    ranks = workers.run(draws, 4, Layout(pipeline=2), *steps)
    assert different(*(own for rank in ranks for own, _ in rank))

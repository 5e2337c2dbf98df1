"""Process groups of a layout, rank coordinates, RNG seeds and megatron-core's global state."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError
from tests.config.test_layout import splits

pytestmark = pytest.mark.distributed

LAYOUT = Layout(tensor=2, pipeline=2)


# --- starting and stopping --------------------------------------------------------------------


def start_and_stop(layouts: list[Layout]) -> list[dict[str, int]]:
    """Start each layout and read the group sizes from megatron-core."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_idpo.mcore.parallel.groups import start_layout, stop_layout

    all_sizes = []
    for layout in layouts:
        start_layout(layout, seed=3)
        with pytest.raises(RuntimeError, match="stop"):
            start_layout(layout)
        assert get_cuda_rng_tracker().get_states()
        all_sizes.append(
            {
                "tensor": ps.get_tensor_model_parallel_world_size(),
                "pipeline": ps.get_pipeline_model_parallel_world_size(),
                "virtual_pipeline": ps.get_virtual_pipeline_model_parallel_world_size() or 1,
                "data": ps.get_data_parallel_world_size(),
            }
        )
        stop_layout()
        stop_layout()
        assert not ps.is_initialized() and not get_cuda_rng_tracker().get_states()
    return all_sizes


def test_group_sizes_match_the_layout(workers):
    layouts = [
        Layout(),
        Layout(pipeline=4),
        Layout(pipeline=2, virtual_pipeline=2),
        Layout(tensor=2, pipeline=2, sequence_parallel=True),
    ]
    for all_sizes in workers.run(start_and_stop, 4, layouts):
        for layout, sizes in zip(layouts, all_sizes, strict=True):
            assert sizes == {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual_pipeline": layout.virtual_pipeline,
                "data": layout.data(4),
            }


def after_layouts(rounds: int, *, fails: bool) -> list[dict[str, int]]:
    """Process groups, threads and open files of this rank after each layout, and a sum in one."""
    import gc
    import os

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    from megatron_idpo.checkpoint.background_save import BackgroundWorker
    from megatron_idpo.mcore.parallel.groups import ModelGroups
    from megatron_idpo.mcore.parallel.pipeline import stage_group
    from megatron_idpo.mcore.parallel.world import running_layout

    counts = []
    for _ in range(rounds):
        total = torch.ones(())
        with contextlib.suppress(ConfigError), running_layout(Layout(pipeline=2)):
            stages = stage_group(ModelGroups.of(), is_member=True, needs_group=True)
            assert stages is not None
            for group in (stages.group, BackgroundWorker().group, ModelGroups.of().pipeline):
                dist.all_reduce(total, group=group)
            if fails:
                raise ConfigError.at("a run", "fails", "try again")
            del stages, group
        gc.collect()
        counts.append(
            {
                "sum": int(total),
                "groups": len(_world.pg_map),
                "threads": len(os.listdir("/proc/self/task")),
                "files": len(os.listdir("/proc/self/fd")),
            }
        )
    return counts


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
def test_a_layout_leaves_no_process_group_behind(workers):
    for counts in workers.run(after_layouts, 2, 3, fails=False):
        assert counts[0] == counts[1] == counts[2], counts
        assert (counts[0]["sum"], counts[0]["groups"]) == (8, 1), "the world's group is left"


def test_after_an_error_no_rank_waits_to_destroy_groups_and_the_next_layout_runs(workers):
    for counts in workers.run(after_layouts, 2, 2, fails=True):
        assert [one["sum"] for one in counts] == [8, 8]
        assert 1 < counts[0]["groups"] < counts[1]["groups"], "they end with the world"


def megatron_layers(cases: list[tuple[int, Layout]]) -> list[list[list[range]]]:
    """The layers of each layout, stage and chunk by megatron-core's own functions."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_idpo.mcore.model.build import layout_fields

    def layers(config: Any, vp_stage: int | None, pp_rank: int) -> range:
        # As globals: for a custom pipeline layout the functions do not pass a rank argument on.
        parallel_state.set_pipeline_model_parallel_rank(pp_rank)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(
            config.virtual_pipeline_model_parallel_size
        )
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))

    by_layout = []
    for num_layers, layout in cases:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=64,
            num_attention_heads=8,
            pipeline_dtype="float32",
            **layout_fields(layout, num_layers),
        )
        chunks = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
        by_layout.append(
            [[layers(config, chunk, stage) for chunk in chunks] for stage in range(layout.pipeline)]
        )
    return by_layout


def test_megatron_places_layers_like_the_layout(workers):
    cases = list(splits())
    (by_layout,) = workers.run(megatron_layers, 1, cases)
    for (num_layers, layout), stages in zip(cases, by_layout, strict=True):
        for stage, ranges in enumerate(stages):
            chunks = range(layout.virtual_pipeline)
            assert ranges == [layout.layers(num_layers, stage, chunk) for chunk in chunks], layout


def start_in_the_wrong_world() -> str:
    from megatron_idpo.mcore.parallel.groups import start_layout

    with pytest.raises(ConfigError) as error:
        start_layout(Layout(tensor=3))
    return str(error.value)


def test_start_layout_rejects_a_world_of_the_wrong_size(workers):
    assert "do not divide the world of 2" in workers.run(start_in_the_wrong_world, 2)[0]


def start_and_reset() -> bool:
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker, random

    from megatron_idpo.mcore.parallel.groups import reset_megatron_state

    def fail(x):
        raise ValueError

    for _ in range(2):  # the second round fails if the first leaves state behind
        parallel_state.initialize_model_parallel()
        random.model_parallel_cuda_manual_seed(1)
        num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
        with pytest.raises(ValueError):
            checkpoint(fail, False, torch.ones(1, requires_grad=True))
        assert random.is_checkpointing()
        reset_megatron_state()
        reset_megatron_state()
        assert not parallel_state.is_initialized()
        assert not random.is_checkpointing()
        assert get_cuda_rng_tracker().get_states() == {}
    return torch.distributed.is_initialized()


def test_reset_clears_megatron_state_and_keeps_the_default_group(workers):
    assert workers.run(start_and_reset, 1) == [True]


# --- coordinates and collectives --------------------------------------------------------------


def coordinates(layout: Layout) -> tuple[Any, ...]:
    from megatron_idpo.mcore.parallel.groups import (
        ModelGroups,
        data_parallel_size,
        rank_coordinates,
        start_layout,
    )

    start_layout(layout)
    rank = rank_coordinates()
    size = ModelGroups.of().tensor_size
    return rank.tp_rank, rank.tp_size, rank.pp_rank, rank.dp_rank, data_parallel_size(), size


def test_rank_coordinates_follow_megatrons_order(workers):
    """Tensor-parallel ranks are adjacent, then data, then pipeline."""
    # (tp_rank, tp_size, pp_rank, dp_rank, data-parallel size, size of the tensor-parallel group)
    assert workers.run(coordinates, 4, LAYOUT) == [
        (rank % 2, 2, rank // 2, 0, 1, 2) for rank in range(4)
    ]
    assert workers.run(coordinates, 4, Layout(tensor=2)) == [
        (rank % 2, 2, 0, rank // 2, 2, 2) for rank in range(4)
    ]
    assert workers.run(coordinates, 4, Layout(pipeline=2)) == [
        (0, 1, rank // 2, rank % 2, 2, 1) for rank in range(4)
    ]


def gather(layout: Layout) -> list[list[float]] | None:
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, start_layout

    start_layout(layout)
    rows = torch.full((3, 2), float(dist.get_rank()))
    shards = gather_tensor_shards(rows[:, :1])  # a non-contiguous view
    return None if shards is None else [shard.flatten().tolist() for shard in shards]


def test_shards_are_gathered_to_the_first_tensor_rank(workers):
    assert workers.run(gather, 4, LAYOUT) == [
        [[0.0] * 3, [1.0] * 3],
        None,
        [[2.0] * 3, [3.0] * 3],
        None,
    ]
    assert workers.run(gather, 2, Layout(pipeline=2)) == [[[0.0] * 3], [[1.0] * 3]]


# --- random numbers ---------------------------------------------------------------------------


def draws(layout: Layout, *steps: tuple[int, int]) -> list[tuple[list[float], list[float]]]:
    """For each (seed, step): numbers from torch's generator and from the tensor-parallel one."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_idpo.mcore.parallel.groups import seed_rng_for_step, start_layout

    start_layout(layout, seed=sum(map(sum, steps)))
    numbers = []
    for seed, step in steps:
        seed_rng_for_step(seed, step)
        default = torch.rand(4).tolist()
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(4).tolist()
        numbers.append((default, tracked))
    return numbers


def all_different(*values: Any) -> bool:
    return len({str(value) for value in values}) == len(values)


def test_draws_depend_on_seed_and_step_only(workers):
    ((first, second, again, other_seed, negative),) = workers.run(
        draws, 1, Layout(), (7, 1), (7, 2), (7, 1), (8, 1), (-3, -2)
    )
    assert first == again
    assert all_different(*first, *second, *other_seed, *negative)


def test_tensor_ranks_share_only_torchs_generator(workers):
    (one,), (other,) = workers.run(draws, 2, Layout(tensor=2), (7, 1))
    assert one[0] == other[0]
    assert all_different(one[0], one[1], other[1])


def test_context_ranks_draw_differently(workers):
    """They have different positions, hence different dropout masks; tensor ranks of each agree."""
    ranks = workers.run(draws, 4, Layout(tensor=2, context=2), (7, 1))
    (one,), (same_part,), (other_part,), (_,) = ranks
    assert one[0] == same_part[0] != other_part[0]
    assert all_different(*(tracked for ((_, tracked),) in ranks), one[0], other_part[0])


def test_stages_and_data_ranks_draw_differently_in_all_steps(workers):
    """No stage draws in one step what another stage draws in another step."""
    steps = [(0, step) for step in range(20)]
    ranks = workers.run(draws, 4, Layout(pipeline=2), *steps)
    assert all_different(*(default for rank in ranks for default, _ in rank))
    assert all_different(*(tracked for rank in ranks for _, tracked in rank))

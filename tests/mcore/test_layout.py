"""megatron-core's groups and layer placement agree with `Layout`."""

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError
from tests.config.test_layout import splits


def megatron_layers(layout: Layout, num_layers: int) -> list[range]:
    """This rank's chunks as megatron-core itself counts them."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_idpo.mcore.model.build import layout_fields

    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=64,
        num_attention_heads=8,
        pipeline_dtype="float32",
        **layout_fields(layout, num_layers),
    )
    chunks = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
    offsets = [get_transformer_layer_offset(config, vp_stage=chunk) for chunk in chunks]
    counts = [get_num_layers_to_build(config, vp_stage=chunk) for chunk in chunks]
    return [range(first, first + n) for first, n in zip(offsets, counts, strict=True)]


def start_and_count(layouts: list[tuple[int, Layout]]) -> list[tuple[int, dict[str, int], list]]:
    """In a worker: start each layout and ask megatron-core for its groups and layers."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_idpo.mcore.parallel.groups import start_layout, stop_layout

    message = []
    for num_layers, layout in layouts:
        start_layout(layout, seed=3)
        with pytest.raises(RuntimeError, match="stop"):
            start_layout(layout)
        assert get_cuda_rng_tracker().get_states()
        sizes = {
            "tensor": ps.get_tensor_model_parallel_world_size(),
            "pipeline": ps.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline": ps.get_virtual_pipeline_model_parallel_world_size() or 1,
            "data": ps.get_data_parallel_world_size(),
        }
        rank = ps.get_pipeline_model_parallel_rank()
        message.append((rank, sizes, megatron_layers(layout, num_layers)))
        stop_layout()
        stop_layout()
        assert not ps.is_initialized() and not get_cuda_rng_tracker().get_states()
    return message


@pytest.mark.distributed
def test_megatron_places_the_layers_where_the_layout_says(workers):
    world_size = 4
    layouts = [(n, layout) for n, layout in splits() if world_size % layout.pipeline == 0]
    layouts = [case for case in layouts if case[0] in (7, 8, 12)]
    layouts.append((8, Layout(tensor=2, pipeline=2, sequence_parallel=True)))
    for answers in workers.run(start_and_count, world_size, layouts):
        for (num_layers, layout), (rank, sizes, ranges) in zip(layouts, answers, strict=True):
            chunks = range(layout.virtual_pipeline)
            assert ranges == [layout.layers(num_layers, rank, chunk) for chunk in chunks], layout
            assert sizes == {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual_pipeline": layout.virtual_pipeline,
                "data": layout.data(world_size),
            }


def refuse_this_world() -> str:
    """In a worker: a layout that does not divide the world."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    with pytest.raises(ConfigError) as refused:
        start_layout(Layout(tensor=3))
    return str(refused.value)


@pytest.mark.distributed
def test_starting_in_the_wrong_world_is_refused(workers):
    assert "do not divide the world of 2" in workers.run(refuse_this_world, 2)[0]

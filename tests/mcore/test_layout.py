"""A layout says which layers are where as megatron-core does, and refuses what cannot work."""

from dataclasses import dataclass
from itertools import product

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The part of an `Architecture` that a layout looks at."""

    family: str = "llama"
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    ffn_hidden_size: int = 128
    vocab_size: int = 512
    num_experts: int = 0


def locations(
    layout: Layout, shape: Shape | None = None, world_size: int | None = None
) -> list[str]:
    return [problem.location for problem in layout.problems_for(shape, world_size)]


# Impossible value, the places it is reported at, and a word of its remedy.
IMPOSSIBLE = [
    (Layout(tensor=0), Shape(), 8, ["layout.tensor"], "1 or more"),
    (Layout(tensor=3), Shape(num_kv_heads=3), 3, ["layout.tensor"] * 2, "one of 1"),
    (Layout(tensor=8), Shape(), 8, ["layout.tensor"], "one of 1, 2, 4"),
    (Layout(tensor=2), Shape(ffn_hidden_size=33), 2, ["layout.tensor"], "one of 1"),
    (Layout(tensor=4), Shape(vocab_size=3), 4, ["layout.tensor"], "at most 3"),
    (Layout(pipeline=3), Shape(), 3, ["layout.pipeline"], "[3, 3, 2]"),
    (Layout(pipeline=16), Shape(), 16, ["layout.pipeline"], "at most 8 stages"),
    (Layout(pipeline=2, virtual_pipeline=3), Shape(), 2, ["layout.pipeline"], "1, 2, 4, 8"),
    (Layout(virtual_pipeline=2), Shape(), 1, ["layout.virtual_pipeline"], "layout.pipeline to 2"),
    (
        Layout(pipeline=2, virtual_pipeline=2, batch_p2p_comm=True),
        Shape(),
        2,
        ["layout.batch_p2p_comm"],
        "to false",
    ),
    (Layout(sequence_parallel=True), Shape(), 1, ["layout.sequence_parallel"], "layout.tensor to"),
    (Layout(context=2), Shape(), 2, ["layout.context"], "layout.context to 1"),
    (Layout(expert=2), Shape(), 2, ["layout.expert"], "layout.expert to 1"),
    (Layout(expert=3), Shape(num_experts=8), 3, ["layout.expert"], "1, 2, 4, 8"),
    (Layout(expert=4), Shape(num_experts=8), 2, ["layout.expert"], "multiple of 4"),
    (Layout(tensor=2), Shape(num_experts=8), 2, ["layout.sequence_parallel"], "to true"),
    (Layout(tensor=2, pipeline=2), Shape(), 6, ["layout"], "multiple of 4"),
    (Layout(pipeline=2, pipeline_layers=(8,)), Shape(), 2, ["layout.pipeline_layers"], "= 2"),
    (Layout(pipeline=2, pipeline_layers=(5, 2)), Shape(), 2, ["layout.pipeline_layers"], "[4, 4]"),
    (Layout(pipeline=2, pipeline_layers=(8, 0)), Shape(), 2, ["layout.pipeline_layers"], "1 or"),
    (Layout(pipeline_layers=()), Shape(), 1, ["layout.pipeline_layers"] * 3, "= 1"),
]


@pytest.mark.parametrize(("layout", "shape", "world_size", "expected", "remedy"), IMPOSSIBLE)
def test_impossible_layouts_name_their_place_and_remedy(
    layout, shape, world_size, expected, remedy
):
    problems = layout.problems_for(shape, world_size)
    assert [problem.location for problem in problems] == expected
    assert all(problem.remedy for problem in problems)
    assert any(remedy in problem.remedy for problem in problems), problems
    with pytest.raises(ConfigError):
        layout.check(shape, world_size)


POSSIBLE = [
    (Layout(), Shape(), 1),
    (Layout(tensor=4, sequence_parallel=True), Shape(), 8),
    (Layout(tensor=2, pipeline=2, virtual_pipeline=2), Shape(), 8),
    (Layout(pipeline=4, virtual_pipeline=2, batch_p2p_comm=True), Shape(), 4),
    (Layout(pipeline=2, batch_p2p_comm=True), Shape(), 2),
    (Layout(pipeline=3, pipeline_layers=(2, 3, 3)), Shape(), 3),
    (Layout(tensor=2, sequence_parallel=True, expert=2), Shape(num_experts=4), 8),
]


@pytest.mark.parametrize(("layout", "shape", "world_size"), POSSIBLE)
def test_possible_layouts_pass(layout, shape, world_size):
    layout.check(shape, world_size)


def test_all_problems_are_told_together():
    layout = Layout(
        tensor=3, pipeline=3, context=2, expert=2, virtual_pipeline=1, sequence_parallel=False
    )
    assert set(locations(layout, Shape(), 5)) == {
        "layout",
        "layout.tensor",
        "layout.pipeline",
        "layout.context",
        "layout.expert",
    }


def test_the_model_and_the_world_may_be_left_out():
    assert locations(Layout(tensor=3)) == []
    assert locations(Layout(tensor=3), world_size=4) == ["layout"]


def test_data_parallelism_is_what_is_left():
    assert Layout(tensor=2, pipeline=2).data(8) == 2


def splits() -> list[tuple[int, Layout]]:
    """Layer counts and layouts that can hold them: even ones and two uneven ones."""
    even = [
        (num_layers, Layout(pipeline=pipeline, virtual_pipeline=chunks))
        for num_layers, pipeline, chunks in product((4, 8, 12, 24), (1, 2, 3, 4), (1, 2, 3))
        if num_layers % (pipeline * chunks) == 0 and not (pipeline == 1 and chunks > 1)
    ]
    uneven = [
        (7, Layout(pipeline=2, pipeline_layers=(3, 4))),
        (7, Layout(pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 3, 2, 1))),
        (13, Layout(pipeline=3, virtual_pipeline=2, pipeline_layers=(1, 2, 3, 4, 2, 1))),
        (7, Layout(pipeline_layers=(7,))),
    ]
    return even + uneven


@pytest.mark.parametrize(("num_layers", "layout"), splits())
def test_every_layer_is_in_exactly_one_chunk(num_layers, layout):
    chunks = product(range(layout.virtual_pipeline), range(layout.pipeline))
    in_order = [layer for chunk, rank in chunks for layer in layout.layers(num_layers, rank, chunk)]
    assert in_order == list(range(num_layers))


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

"""Layouts: invalid combinations, and which layers are in which model chunk."""

from dataclasses import dataclass
from itertools import product

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The part of an `Architecture` that a layout depends on."""

    family: str = "llama"
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    ffn_hidden_size: int = 128
    vocab_size: int = 512
    num_experts: int = 0
    dense_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0


@pytest.mark.parametrize(
    ("fields", "location", "remedy"),
    [
        ({"tensor": 0}, "layout.tensor", "greater than 0"),
        ({"virtual_pipeline": 2}, "layout.virtual_pipeline", "layout.pipeline to 2"),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "batch_p2p_comm": True},
            "layout.batch_p2p_comm",
            "to false",
        ),
        ({"sequence_parallel": True}, "layout.sequence_parallel", "layout.tensor to 2"),
        ({"pipeline": 2, "pipeline_layers": (8, 0)}, "layout.pipeline_layers.1", "greater than 0"),
    ],
)
def test_contradicting_fields_are_rejected_on_construction(fields, location, remedy):
    with pytest.raises(ConfigError) as error:
        Layout(**fields)
    (problem,) = error.value.problems
    assert problem.location == location and remedy in problem.remedy


@pytest.mark.parametrize(
    ("layout", "shape", "world_size", "locations", "remedy"),
    [
        (Layout(tensor=3), Shape(num_kv_heads=3), 3, ["layout.tensor"] * 2, "one of 1"),
        (Layout(tensor=8), Shape(), 8, ["layout.tensor"], "one of 1, 2, 4"),
        (Layout(tensor=2), Shape(ffn_hidden_size=33), 2, ["layout.tensor"], "one of 1"),
        (Layout(tensor=4), Shape(vocab_size=3), 4, ["layout.tensor"], "at most 3"),
        (Layout(pipeline=3), Shape(), 3, ["layout.pipeline"], "[3, 3, 2]"),
        (Layout(pipeline=16), Shape(), 16, ["layout.pipeline"], "at most 8 stages"),
        (Layout(pipeline=2, virtual_pipeline=3), Shape(), 2, ["layout.pipeline"], "1, 2, 4, 8"),
        (Layout(expert=2), Shape(), 2, ["layout.expert"], "layout.expert to 1"),
        (Layout(expert=3), Shape(num_experts=8), 3, ["layout.expert"], "1, 2, 4, 8"),
        (Layout(expert=4), Shape(num_experts=8), 2, ["layout.expert"], "multiple of 4"),
        (Layout(tensor=2), Shape(num_experts=8), 2, ["layout.sequence_parallel"], "to true"),
        (Layout(context=2, expert=4), Shape(num_experts=8), 2, ["layout.expert"], "multiple of 4"),
        (Layout(context=2), Shape(), 3, ["layout"], "multiple of 2"),
        (Layout(expert_tensor=1), Shape(), 1, ["layout.expert_tensor"], "leave it out"),
        (
            Layout(expert_tensor=3),
            Shape(num_experts=8),
            3,
            ["layout.expert_tensor"],
            "1, 2, 4, 8, 16",
        ),
        (
            Layout(expert=4, expert_tensor=1),
            Shape(num_experts=8),
            2,
            ["layout.expert_tensor"],
            "multiple of 4",
        ),
        (Layout(tensor=2, pipeline=2), Shape(), 6, ["layout"], "multiple of 4"),
        (Layout(pipeline=2, pipeline_layers=(8,)), Shape(), 2, ["layout.pipeline_layers"], "= 2"),
        (Layout(pipeline=2, pipeline_layers=(5, 2)), Shape(), 2, ["layout.pipeline_layers"], "[4"),
        (Layout(pipeline_layers=()), Shape(), 1, ["layout.pipeline_layers"] * 2, "= 1"),
    ],
)
def test_layouts_that_do_not_fit_model_or_world(layout, shape, world_size, locations, remedy):
    problems = layout.problems_for(shape, world_size)
    assert [problem.location for problem in problems] == locations
    assert all(problem.remedy for problem in problems)
    assert any(remedy in problem.remedy for problem in problems), problems
    with pytest.raises(ConfigError):
        layout.check(shape, world_size)


@pytest.mark.parametrize(
    ("layout", "shape", "world_size"),
    [
        (Layout(), Shape(), 1),
        (Layout(tensor=4, sequence_parallel=True), Shape(), 8),
        (Layout(tensor=2, pipeline=2, virtual_pipeline=2), Shape(), 8),
        (Layout(pipeline=4, virtual_pipeline=2, batch_p2p_comm=True), Shape(), 4),
        (Layout(pipeline=2, batch_p2p_comm=True), Shape(), 2),
        (Layout(pipeline=3, pipeline_layers=(2, 3, 3)), Shape(), 3),
        (Layout(tensor=2, sequence_parallel=True, expert=2), Shape(num_experts=4), 8),
        (Layout(context=2, expert=2), Shape(num_experts=4), 2),
        (
            Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
            Shape(num_experts=4, ffn_hidden_size=33),
            2,
        ),
    ],
)
def test_valid_layouts_pass(layout, shape, world_size):
    layout.check(shape, world_size)


def test_all_problems_are_reported_together():
    problems = Layout(tensor=3, pipeline=3, expert=2).problems_for(Shape(), 5)
    assert {problem.location for problem in problems} == {
        "layout",
        "layout.tensor",
        "layout.pipeline",
        "layout.expert",
    }


def test_model_and_world_are_optional():
    assert Layout(tensor=3).problems_for() == []
    (problem,) = Layout(tensor=3).problems_for(world_size=4)
    assert problem.location == "layout"


def test_data_parallel_size_is_the_remaining_factor():
    assert Layout(tensor=2, pipeline=2).data(8) == 2


def splits() -> list[tuple[int, Layout]]:
    """Layer counts and layouts that can hold them, with even and uneven splits."""
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


def test_every_layer_is_in_exactly_one_chunk():
    for num_layers, layout in splits():
        chunks = product(range(layout.virtual_pipeline), range(layout.pipeline))
        layers = [n for chunk, rank in chunks for n in layout.layers(num_layers, rank, chunk)]
        assert layers == list(range(num_layers)), layout


def test_a_billion_stages_are_refused_at_once():
    """The list of an example split would fill the memory."""
    [problem] = Layout(pipeline=2**31 - 1).problems_for(Shape())
    assert "8 layers fill at most 8 stages" in problem.remedy

"""Ranges of a flattened parameter as chunks of the whole tensor."""

import random
from math import prod

import pytest
import torch

from megatron_idpo.checkpoint.tensor_chunks import Region, rectangles, tensor_chunks_of, unwrapped

SHAPES = [(), (7,), (5, 4), (1, 6), (6, 1), (3, 2, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_cover_exactly_the_range(shape):
    """Every range of every shape: the right elements, in memory order, each once."""
    numbers = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            elements = []
            for offset, size in rectangles(shape, start, stop):
                part = numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
                elements += part.flatten().tolist()
            assert elements == list(range(start, stop)), (start, stop)


def test_matrix_range_is_at_most_three_rectangles():
    assert len(list(rectangles((5, 4), 2, 19))) == 3
    assert list(rectangles((5, 4), 0, 20)) == [((0, 0), (5, 4))]
    assert list(rectangles((5, 4), 5, 7)) == [((1, 1), (1, 2))]


def sharded(shape, *offsets, ahead=0, replica=(0, 0, 0), padded=False):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor.from_rank_offsets(
        "w",
        torch.zeros(shape),
        *offsets,
        replica_id=replica,
        prepend_axis_num=ahead,
        allow_shape_mismatch=padded,
    )


def test_chunks_are_at_the_shards_position():
    """Second of three layers, right half of its columns, any range of the shard."""
    shard = sharded((4, 3), (0, 1, 3), (2, 1, 2), ahead=1)
    whole = torch.arange(3 * 4 * 6.0).view(3, 4, 6)
    values = whole[1, :, 3:].reshape(-1)
    chance = random.Random(0)
    for _ in range(50):
        start, stop = sorted(chance.choices(range(13), k=2))
        for chunk in tensor_chunks_of(Region(shard, 0), values[start:stop], start, prefix="m."):
            assert (chunk.key, chunk.global_shape, chunk.padded) == ("m.w", (3, 4, 6), False)
            location = [
                slice(o, o + s) for o, s in zip(chunk.offset, chunk.tensor.shape, strict=True)
            ]
            assert torch.equal(chunk.tensor, whole[tuple(location)])
            assert chunk.tensor.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def test_region_takes_only_its_elements():
    """The second of two regions with 6 elements each, from a range of elements 4 to 9."""
    region = Region(sharded((2, 3)), 6)
    chunks = [
        (chunk.offset, chunk.tensor.tolist())
        for chunk in tensor_chunks_of(region, torch.arange(4, 10), 4)
    ]
    assert chunks == [((0, 0), [[6, 7, 8]]), ((1, 0), [[9]])]
    assert not list(tensor_chunks_of(region, torch.arange(4.0, 6.0), 4))


@pytest.mark.parametrize(
    ("replica", "whole", "partitioned"),
    [
        ((0, 0, 0), True, True),
        ((0, 0, 1), False, True),
        ((0, 1, 0), False, False),
        ((1, 0, 0), False, False),
        (0, True, None),
        (2, False, None),
    ],
)
def test_exactly_one_copy_is_saved(replica, whole, partitioned):
    """The last replica number counts data-parallel ranks; partitioned, each saves its own range."""
    region = Region(sharded((2,), replica=replica), 0)
    assert [chunk.saved_here for chunk in tensor_chunks_of(region, torch.zeros(2), 0)] == [whole]
    if partitioned is not None:
        (chunk,) = tensor_chunks_of(region, torch.zeros(2), 0, is_partitioned=True)
        assert chunk.saved_here == partitioned


def test_padded_tensor_is_marked():
    (chunk,) = tensor_chunks_of(Region(sharded((2,), padded=True), 0), torch.zeros(2), 0)
    assert chunk.padded


def regions() -> dict[str, list[tuple[str, int, int]]]:
    from megatron_idpo.checkpoint.tensor_chunks import regions_by_parameter
    from megatron_idpo.config.layout import Layout
    from tests.plugin import tiny_megatron as tiny

    chunks = tiny.start(Layout(tensor=2))
    wrapper = torch.nn.Module()
    wrapper.module = chunks[0]
    names = {parameter: name for name, parameter in chunks[0].named_parameters()}
    by_parameter = regions_by_parameter([wrapper])
    assert set(by_parameter) == set(names)
    return {
        names[parameter]: [(region.sharded.key, region.start, region.stop) for region in own]
        for parameter, own in by_parameter.items()
    }


@pytest.mark.distributed
def test_regions_of_a_models_parameters(workers):
    """Of a wrapped model; SwiGLU's fused weight is two regions of one parameter."""
    first, second = workers.run(regions, 2)
    assert first == second
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert first["decoder.layers.1.mlp.linear_fc1.weight"] == [(key, 0, 768), (key, 768, 1536)]
    norm = "decoder.final_layernorm.weight"
    assert first[norm] == [(norm, 0, 32)]


def test_wrappers_are_removed():
    inner, outer = torch.nn.Linear(1, 1), torch.nn.Module()
    outer.module = torch.nn.Module()
    outer.module.module = inner
    assert unwrapped(outer) is inner and unwrapped(inner) is inner

"""Stretches of memory as rectangles of a whole tensor."""

import random
from math import prod

import pytest
import torch

from megatron_idpo.checkpoint.tensor_chunks import Region, bare, rectangles, tensor_chunks_of

SHAPES = [(), (7,), (5, 4), (1, 6), (6, 1), (3, 2, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_are_the_stretch(shape):
    """Every stretch of every shape: the right elements, in their order, each once."""
    numbers = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            found = []
            for offset, size in rectangles(shape, start, stop):
                part = numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
                found += part.flatten().tolist()
            assert found == list(range(start, stop)), (start, stop)


def test_a_matrix_needs_three_at_most():
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


def test_boxes_lie_where_the_shard_does():
    """The second layer of three, the right half of its columns, from any stretch of the shard."""
    shard = sharded((4, 3), (0, 1, 3), (2, 1, 2), ahead=1)
    whole = torch.arange(3 * 4 * 6.0).view(3, 4, 6)
    values = whole[1, :, 3:].reshape(-1)
    chance = random.Random(0)
    for _ in range(50):
        start, stop = sorted(chance.choices(range(13), k=2))
        for box in tensor_chunks_of(Region(shard, 0), values[start:stop], start, prefix="m."):
            assert (box.key, box.whole, box.padded) == ("m.w", (3, 4, 6), False)
            location = [slice(o, o + s) for o, s in zip(box.offset, box.tensor.shape, strict=True)]
            assert torch.equal(box.tensor, whole[tuple(location)])
            assert box.tensor.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def test_a_region_takes_its_part_of_a_stretch():
    """The second of two regions of 6 elements, of a stretch of elements 4 to 9."""
    region = Region(sharded((2, 3)), 6)
    found = [
        (box.offset, box.tensor.tolist())
        for box in tensor_chunks_of(region, torch.arange(4, 10), 4)
    ]
    assert found == [((0, 0), [[6, 7, 8]]), ((1, 0), [[9]])]
    assert not list(tensor_chunks_of(region, torch.arange(4.0, 6.0), 4))


@pytest.mark.parametrize(
    ("replica", "whole", "cut"),
    [
        ((0, 0, 0), True, True),
        ((0, 0, 1), False, True),
        ((0, 1, 0), False, False),
        ((1, 0, 0), False, False),
        (0, True, None),
        (2, False, None),
    ],
)
def test_one_copy_is_saved(replica, whole, cut):
    """Of data-parallel copies (the last number), that is each of them where they share one."""
    region = Region(sharded((2,), replica=replica), 0)
    assert [box.saved_here for box in tensor_chunks_of(region, torch.zeros(2), 0)] == [whole]
    if cut is not None:
        (box,) = tensor_chunks_of(region, torch.zeros(2), 0, is_cut=True)
        assert box.saved_here == cut


def test_a_padded_tensor_is_marked():
    (box,) = tensor_chunks_of(Region(sharded((2,), padded=True), 0), torch.zeros(2), 0)
    assert box.padded


def regions() -> dict[str, list[tuple[str, int, int]]]:
    from megatron_idpo.checkpoint.tensor_chunks import regions_by_parameter
    from megatron_idpo.mcore.parallel.layout import Layout
    from tests.plugin import tiny_megatron as tiny

    chunks = tiny.start(Layout(tensor=2))
    wrapper = torch.nn.Module()
    wrapper.module = chunks[0]
    names = {parameter: name for name, parameter in chunks[0].named_parameters()}
    found = regions_by_parameter([wrapper])
    assert set(found) == set(names)
    return {
        names[parameter]: [(region.sharded.key, region.start, region.stop) for region in own]
        for parameter, own in found.items()
    }


@pytest.mark.distributed
def test_the_parameters_of_a_model(workers):
    """Wrapped or not; SwiGLU's fused weight is two regions of one parameter."""
    one, other = workers.run(regions, 2)
    assert one == other
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert one["decoder.layers.1.mlp.linear_fc1.weight"] == [(key, 0, 768), (key, 768, 1536)]
    norm = "decoder.final_layernorm.weight"
    assert one[norm] == [(norm, 0, 32)]


def test_wrappers_are_seen_through():
    inner, outer = torch.nn.Linear(1, 1), torch.nn.Module()
    outer.module = torch.nn.Module()
    outer.module.module = inner
    assert bare(outer) is inner and bare(inner) is inner

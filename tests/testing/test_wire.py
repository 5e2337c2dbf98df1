import pickle

import pytest
import torch

from megatron_idpo.testing import wire

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)])
def test_tensors_arrive_as_they_were(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    arrived = wire.loads(wire.dumps({"inside": [tensor]}))["inside"][0]
    assert arrived.dtype == dtype and arrived.shape == shape
    assert torch.equal(arrived, tensor)
    arrived.zero_()  # It is writable, and its own.


def test_views_and_transposes_carry_only_themselves():
    base = torch.arange(10_000.0).reshape(100, 100)
    message = wire.dumps(base[:2, :3].t())
    assert len(message) < 1000
    assert wire.loads(message).tolist() == [[0.0, 100.0], [1.0, 101.0], [2.0, 102.0]]


def test_parameters_and_gradients_keep_their_kind():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    graph = torch.ones(2, requires_grad=True) * 2
    arrived_frozen, arrived_graph = wire.loads(wire.dumps((frozen, graph)))
    assert isinstance(arrived_frozen, torch.nn.Parameter) and not arrived_frozen.requires_grad
    assert arrived_graph.requires_grad and arrived_graph.is_leaf


def test_other_layouts_and_objects_go_as_pickle_does_them():
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(wire.loads(wire.dumps(sparse)).to_dense(), torch.eye(3))
    assert wire.loads(wire.dumps({"a": (1, "b")})) == {"a": (1, "b")}
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        wire.dumps(lambda: None)


def test_nothing_of_megatron_is_named():
    assert b"megatron.core" not in wire.dumps(torch.ones(1))

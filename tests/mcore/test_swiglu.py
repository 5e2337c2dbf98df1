"""Our SwiGLU against autograd's own, and what it keeps."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from megatron_idpo.mcore.model import swiglu
from megatron_idpo.mcore.model.swiglu import SwiGLU

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
"""Relative to the largest value: one or two roundings of the format."""


def config(**changed):
    fields = {
        "gated_linear_unit": True,
        "activation_func": silu,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
    }
    return SimpleNamespace(**fields | changed)


def plainly(fused):
    gate, up = fused.chunk(2, dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("block_elements", [1, 40, 1 << 17])
def test_values_and_gradients(dtype, block_elements, monkeypatch):
    monkeypatch.setattr(swiglu, "_BLOCK_ELEMENTS", block_elements)
    torch.manual_seed(0)
    ours = torch.randn(7, 1, 24, dtype=dtype).mul_(3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    grad = torch.randn(7, 1, 12, dtype=dtype)
    for fused, activation in ((ours, SwiGLU(config())), (theirs, plainly)):
        activation(fused).backward(grad)
    for mine, expected in ((SwiGLU(config())(ours), plainly(theirs)), (ours.grad, theirs.grad)):
        worst = (mine - expected).abs().max() / expected.abs().max()
        assert mine.dtype == dtype and worst <= ROUNDING[dtype]


def test_gradients_of_a_gradient_that_is_a_view():
    fused = torch.randn(6, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: SwiGLU(config())(x).transpose(0, 2), fused)


def test_the_input_is_all_that_is_kept():
    kept = []
    fused = torch.randn(5, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU(config())(fused)
    assert [tensor.data_ptr() for tensor in kept] == [fused.data_ptr()]


@pytest.mark.parametrize("changed", [{"glu_linear_offset": 1.0}, {"gated_linear_unit": False}])
def test_another_activation_is_none_of_its_business(changed):
    with pytest.raises(AssertionError):
        SwiGLU(config(**changed))

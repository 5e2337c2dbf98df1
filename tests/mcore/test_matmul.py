"""Products without rounded results."""

from types import SimpleNamespace

import pytest
import torch

from megatron_idpo.mcore.matmul import (
    add_matmul,
    float32_reductions,
    matmul,
    matmul_operand,
    onednn_bf16_matmul,
    slices,
)

FP32_SUMS = {"rtol": 1e-4, "atol": 1e-4}
"""Sums of 64 products of unit normals in another order."""


def test_slices_cover_everything_once():
    assert list(slices(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(slices(6, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(slices(2, 3)) == [slice(0, 2)]
    assert list(slices(0, 3)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_of_narrow_operands_are_not_rounded(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(48, 64).to(dtype), torch.randn(64, 40).to(dtype)
    exact = a.double() @ b.double()
    out = torch.empty(48, 40, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with onednn_bf16_matmul(a):
        matmul(matmul_operand(a, dtype), matmul_operand(b, dtype), out)
        torch.testing.assert_close(out.double(), exact, **FP32_SUMS)
        add_matmul(out, matmul_operand(a, dtype), matmul_operand(b, dtype))
    torch.testing.assert_close(out.double(), 2 * exact, **FP32_SUMS)


def test_onednn_setting_is_restored_after_an_error():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(KeyError), onednn_bf16_matmul(torch.zeros(1, dtype=torch.bfloat16)):
        assert setting.fp32_precision == "bf16"
        raise KeyError
    assert setting.fp32_precision == before
    with onednn_bf16_matmul(torch.zeros(1)):
        assert setting.fp32_precision == before


@pytest.mark.parametrize("before", [True, False, (False, False)])
def test_reductions_are_in_float32_within_the_block_only(before):
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    flags = [flag for flag in (name, f"{name}_split_k") if hasattr(settings, flag)]
    if isinstance(before, tuple) and len(flags) == 1:
        pytest.skip("this torch has one flag")
    setting = tuple(getattr(settings, flag) for flag in flags)
    try:
        setattr(settings, name, before)
        start = [getattr(settings, flag) for flag in flags]
        with float32_reductions(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)):
            assert [getattr(settings, flag) for flag in flags] == [False, *start[1:]]
        assert [getattr(settings, flag) for flag in flags] == start
    finally:
        setattr(settings, name, setting if len(flags) > 1 else setting[0])

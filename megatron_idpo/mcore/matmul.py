"""Matrix products of 16-bit operands whose float32 results are not rounded.

* GPU: `torch.mm(..., out_dtype=float32)`.
* CPU: PyTorch's bf16 product rounds its result and its fp16 product is 100x slower, so operands are
  widened to float32 first. For bf16, oneDNN may then multiply in bf16 again (`onednn_bf16_matmul`).
  That is exact for widened bf16 operands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def slices(length: int, size: int) -> Iterator[slice]:
    """`0..length` in slices of `size`. The last may be shorter; length 0 gives none."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def accumulation_dtype(operand: Tensor) -> torch.dtype:
    """float64 for float64 (gradient checks), float32 for everything else."""
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def matmul_operand(values: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """`values` in the dtype in which products take them, for model weights of `weight_dtype`.

    16-bit weights multiply as float32 on a CPU and as they are elsewhere.
    """
    is_widened = values.device.type == "cpu" and weight_dtype.itemsize < 4
    return values.to(torch.float32 if is_widened else weight_dtype)


def matmul(a_nk: Tensor, b_km: Tensor, out_nm: Tensor) -> None:
    """`out = a @ b` for operands from `matmul_operand`; `out` has the accumulation dtype."""
    if a_nk.dtype == out_nm.dtype:
        torch.mm(a_nk, b_km, out=out_nm)
    else:
        torch.mm(a_nk, b_km, out_dtype=out_nm.dtype, out=out_nm)


def add_matmul(out_nm: Tensor, a_nk: Tensor, b_km: Tensor) -> None:
    """`out += a @ b` for operands from `matmul_operand`; `out` has the accumulation dtype."""
    if a_nk.dtype == out_nm.dtype:
        torch.addmm(out_nm, a_nk, b_km, out=out_nm)
    else:
        torch.addmm(out_nm, a_nk, b_km, out_dtype=out_nm.dtype, out=out_nm)


@contextmanager
def float32_reductions(like: Tensor) -> Iterator[None]:
    """On a GPU, add the parts of a split 16-bit product in float32.

    cuBLAS may otherwise add them in 16 bits, where few positions meet many features. This is a
    setting of the whole process; it is restored on exit.
    """
    if not like.is_cuda:
        yield
        return
    settings = torch.backends.cuda.matmul
    name = "bf16" if like.dtype == torch.bfloat16 else "fp16"
    attribute = f"allow_{name}_reduced_precision_reduction"
    before: Any = getattr(settings, attribute)
    inside: Any = False
    # Where torch has it, a second flag is part of the same setting; it is kept.
    if hasattr(settings, f"{attribute}_split_k"):
        split_k = getattr(settings, f"{attribute}_split_k")
        before, inside = (before, split_k), (False, split_k)
    setattr(settings, attribute, inside)
    try:
        yield
    finally:
        setattr(settings, attribute, before)


@contextmanager
def onednn_bf16_matmul(like: Tensor) -> Iterator[None]:
    """On a CPU, multiply widened bf16 operands in bf16 with float32 accumulation.

    This is a oneDNN setting of the whole process; it is restored on exit.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        yield
        return
    # PyTorch creates this attribute at run time, where the type checker cannot see it.
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before

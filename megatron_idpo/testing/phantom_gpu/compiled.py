"""`torch.compile` and FlexAttention on a phantom GPU with arithmetic.

A compiled kernel does nothing, and reads and writes nothing. So a compiled function is called
twice: compiled for the GPU, forward and backward, with the result discarded, and as it is written.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from megatron_idpo.mcore.attention import flex

compiled_calls: dict[str, int] = {}
"""Name of a compiled function -> its calls in this process."""


@contextmanager
def compute_as_written(*, compiles: bool) -> Iterator[None]:
    """Right results of compiled functions and FlexAttention, within the block.

    Args:
        compiles: compile as well. Else the process runs with TORCHDYNAMO_DISABLE=1.
    """
    with ExitStack() as stack:
        if compiles:
            stack.enter_context(patch.object(torch, "compile", _twice(torch.compile)))
        stack.enter_context(patch.object(flex, "flex_attention", _traced_or_dense))
        # The CPU has no kernels of this form. torch keeps the switches for the whole process.
        for kernel in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
        yield


def _traced_or_dense(*args: Any, **kwargs: Any) -> Any:
    # Dynamo traces the real one.
    attend: Any = flex_attention if torch.compiler.is_compiling() else dense_attention
    return attend(*args, **kwargs)


def dense_attention(
    query_BNLD: Tensor,
    key_BMTD: Tensor,
    value_BMTD: Tensor,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    kernel_options: Any = None,
) -> Tensor:
    """FlexAttention with all scores and the same mask function; the block lists are not used."""
    if enable_gqa:
        repeats = query_BNLD.shape[1] // key_BMTD.shape[1]
        key_BMTD = key_BMTD.repeat_interleave(repeats, 1)
        value_BMTD = value_BMTD.repeat_interleave(repeats, 1)
    scale = query_BNLD.shape[-1] ** -0.5 if scale is None else scale
    scores_BNLT = query_BNLD.float() @ key_BMTD.float().transpose(-1, -2) * scale
    if score_mod is not None:  # of ours, only the soft cap, which does not read the indices
        scores_BNLT = score_mod(scores_BNLT, None, None, None, None)
    if block_mask is not None:
        query_L, key_T = (torch.arange(x.shape[2], device=x.device) for x in (query_BNLD, key_BMTD))
        first = torch.zeros((), dtype=torch.long, device=query_BNLD.device)
        is_visible_LT = block_mask.mask_mod(first, first, query_L[:, None], key_T[None])
        scores_BNLT = scores_BNLT.masked_fill(~is_visible_LT, float("-inf"))
        # A query without keys has a softmax of NaN; FlexAttention's result is 0.
        is_seeing_L1 = is_visible_LT.any(-1, keepdim=True)
        weights_BNLT = scores_BNLT.softmax(-1).masked_fill(~is_seeing_L1, 0.0)
    else:
        weights_BNLT = scores_BNLT.softmax(-1)
    return weights_BNLT.to(value_BMTD.dtype) @ value_BMTD


def _twice(real_compile: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` whose functions run compiled, for nothing, and as written."""

    @functools.wraps(real_compile)
    def compile_(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: compile_(decorated, **options)
        compiled = real_compile(function, **options)
        name = getattr(function, "__qualname__", repr(function))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                compiled_calls[name] = compiled_calls.get(name, 0) + 1
                with _disable_current_modes():
                    _run_compiled(compiled, args, kwargs)
            return function(*args, **kwargs)

        return call

    return compile_


def _run_compiled(compiled: Callable[..., Any], args: Any, kwargs: Any) -> None:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)

    def with_grad(values: Any) -> list[Tensor]:
        return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.requires_grad]

    args, kwargs = tree_map(leaf, (args, kwargs))
    outputs, inputs = with_grad(compiled(*args, **kwargs)), with_grad((args, kwargs))
    if outputs and inputs:
        grads = [torch.empty_like(output) for output in outputs]
        torch.autograd.grad(outputs, inputs, grads, allow_unused=True)


# ---- without arithmetic -------------------------------------------------------------------------


@contextmanager
def attend_without_result() -> Iterator[None]:
    """FlexAttention that allocates and keeps what its kernels do, and computes nothing."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:
        return _FlexMemory.apply(query, key, value)

    with patch.object(flex, "flex_attention", attend):
        yield


class _FlexMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BNTD: Tensor, key_BMTD: Tensor, value_BMTD: Tensor) -> Tensor:
        output_BNTD = torch.empty_like(query_BNTD)
        logsumexp_BNT = query_BNTD.new_empty(query_BNTD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_BNTD, key_BMTD, value_BMTD, output_BNTD, logsumexp_BNT)
        return output_BNTD

    @staticmethod
    def backward(ctx: Any, grad_BNTD: Tensor) -> tuple[Tensor, ...]:
        query_BNTD, key_BMTD, value_BMTD, _, logsumexp_BNT = ctx.saved_tensors
        torch.empty_like(logsumexp_BNT)  # row sums of grad * output
        return (
            torch.empty_like(query_BNTD),
            torch.empty_like(key_BMTD),
            torch.empty_like(value_BMTD),
        )

"""Collectives of parts of different sizes, which gloo lacks and NCCL has.

Expert-tensor parallelism gathers the tokens of the tensor-parallel ranks, whose numbers differ, and
reduce-scatters the experts' output. These replace megatron-core's two functions on a CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_uneven(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`mappings._gather_along_first_dim`; parts of different sizes are padded to the largest."""

    def gather(
        input_: Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        sizes = zip(parts, output_split_sizes, strict=True)
        return torch.cat([part[:size] for part, size in sizes])

    return gather


def reduce_scatter_uneven(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`mappings._reduce_scatter_along_first_dim`; parts of different sizes are all-reduced."""

    def reduce_scatter(
        input_: Tensor,
        group: Any,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        own: Tensor = total.split(list(input_split_sizes))[group.rank()]
        return own.clone()

    return reduce_scatter

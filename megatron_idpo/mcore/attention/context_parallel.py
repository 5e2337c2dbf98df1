"""Attention of a row whose positions are dealt to context-parallel ranks.

Each rank has the queries of its positions. Keys and values of the whole row are all-gathered
for one layer at a time and put into row order; the gradients of both are reduce-scattered. Only
this rank's shards are kept for the backward pass, which gathers again and recomputes attention, so
that the memory of a layer is that of its positions. It recomputes like megatron-core's
`selective` recomputation, which would do the same a second time (`mcore.model.build`). A layer that
is itself being recomputed is differentiated next, and keeps what it gathered.

Shape suffixes: `T` positions of the row, `L` of them on this rank, `N` query heads, `M` key-value
heads, `D` head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_idpo.mcore.attention.row_params import ContextShare

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From own queries `[L, 1, N, D]` and the row's keys and values `[T, 1, M, D]` to `[L, 1, N, D]`.
Its result has a graph also if this rank has only padding."""


def attend_dealt_row(
    query_L1ND: Tensor,
    key_L1MD: Tensor,
    value_L1MD: Tensor,
    *,
    share: ContextShare,
    group: dist.ProcessGroup,
    attend: Attend,
    keep: bool,
) -> Tensor:
    """Attention of this rank's positions.

    Collective over `group`, which has the same row on every rank. Forward: two all-gathers, of the
    keys and of the values. Backward: both again (not with `keep`), then two reduce-scatters of
    their gradients.

    Args:
        query_L1ND: of this rank's positions.
        key_L1MD: of this rank's positions.
        value_L1MD: of this rank's positions.
        share: which positions each rank has.
        group: the context-parallel ranks.
        attend: attention with all keys.
        keep: the gathered keys and values for the backward pass, which then recomputes nothing.

    Returns:
        `[L, 1, N, D]`.
    """
    if keep:
        key_T1MD, value_T1MD = _GatherRow.apply(key_L1MD, value_L1MD, share, group)
        return attend(query_L1ND, key_T1MD, value_T1MD)
    output: Tensor = _AttendDealtRow.apply(query_L1ND, key_L1MD, value_L1MD, share, group, attend)
    return output


class _GatherRow(torch.autograd.Function):
    """Both in one function, so that the order of the collectives in backward is fixed."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, share: ContextShare, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.share, ctx.group = share, group
        return _gather_row(key, share, group), _gather_row(value, share, group)

    @staticmethod
    def backward(
        ctx: Any, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        own_key = _reduce_scatter_row(grad_key, ctx.share, ctx.group)
        return own_key, _reduce_scatter_row(grad_value, ctx.share, ctx.group), None, None


class _AttendDealtRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        share: ContextShare,
        group: dist.ProcessGroup,
        attend: Attend,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.share, ctx.group, ctx.attend = share, group, attend
        return attend(query, _gather_row(key, share, group), _gather_row(value, share, group))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        share, group = ctx.share, ctx.group
        inputs = [
            query.detach().requires_grad_(),
            _gather_row(key, share, group).requires_grad_(),
            _gather_row(value, share, group).requires_grad_(),
        ]
        with torch.enable_grad():
            output = ctx.attend(*inputs)
        grads = list(torch.autograd.grad(output, inputs, grad_output))
        del output, inputs  # the gathered keys and values, before the gradients are copied
        grad_value, grad_key = (_reduce_scatter_row(grads.pop(), share, group) for _ in range(2))
        return grads.pop(), grad_key, grad_value, None, None, None


def _gather_row(shard_L1MD: Tensor, share: ContextShare, group: dist.ProcessGroup) -> Tensor:
    """`[T, 1, M, D]` in row order, without a graph, from the ranks' `[L, 1, M, D]`."""
    with torch.no_grad():
        by_rank_T1MD: Tensor = gather_from_sequence_parallel_region(shard_L1MD, group=group)
        return by_rank_T1MD.index_select(0, share.slots_T)


def _reduce_scatter_row(grad_T1MD: Tensor, share: ContextShare, group: dist.ProcessGroup) -> Tensor:
    """This rank's part `[L, 1, M, D]` of the sum over the ranks."""
    with torch.no_grad():
        by_rank_T1MD = grad_T1MD.index_select(0, share.order_T)
        own: Tensor = reduce_scatter_to_sequence_parallel_region(by_rank_T1MD, group=group)
        return own

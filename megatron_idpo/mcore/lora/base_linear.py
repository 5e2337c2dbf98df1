"""The linears that an adapter can be added to: megatron-core's own and Transformer Engine's.

Transformer Engine fuses the norm before attention and before the MLP with the linear after it. The
adapter's input is the norm's output, which the linear returns if `return_layernorm_output` is set.
It is the tensor that it keeps for its backward pass anyway.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_idpo.mcore.lora.frozen_linear import frozen_linear
from megatron_idpo.mcore.lora.products import LowRank

type ParallelLinear = Any
"""An instance of `COLUMN` or `ROW`; megatron-core is not typed."""

type ForwardWithInput = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""Takes a linear's input; returns the input of its product, its output and its bias."""

COLUMN: tuple[type, ...] = (ColumnParallelLinear,)
"""Linears with sharded rows."""

ROW: tuple[type, ...] = (RowParallelLinear,)
"""Linears with sharded columns."""

_WITH_NORM: tuple[type, ...] = ()

# Without Transformer Engine these are mocks, not classes.
if HAVE_TE:
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    COLUMN += (TELayerNormColumnParallelLinear,)
    ROW += (TERowParallelLinear,)
    _WITH_NORM += (TELayerNormColumnParallelLinear,)


def is_adaptable(linear: Any) -> bool:
    """Whether this is such a linear, and not of experts."""
    return isinstance(linear, COLUMN + ROW) and not getattr(linear, "is_expert", False)


def rounds_once(linear: ParallelLinear) -> bool:
    """Whether adapters are added before the output is rounded (`frozen_forward`).

    Not to outputs in fp32, where rounding hides nothing, nor those of Transformer Engine, which
    returns rounded ones.
    """
    is_local = type(linear) in (ColumnParallelLinear, RowParallelLinear)
    return is_local and linear.weight.dtype.itemsize < 4


def frozen_forward(
    linear: ParallelLinear, input_t1I: Tensor, low_rank: LowRank | None
) -> tuple[Tensor, Tensor | None]:
    """`forward` of a linear of megatron-core for which `rounds_once`, and its adapters.

    Collective over the tensor-parallel group, forward and backward, as megatron-core's.

    Args:
        linear: its weight is frozen.
        input_t1I: its input.
        low_rank: the adapters' part; of a row-parallel linear, what this rank's input features
            contribute. None without adapters.

    Returns:
        The output, and the bias if `skip_bias_add`, else None.
    """
    group, bias_O = linear.tp_group, linear.bias
    added_bias_O = None if linear.skip_bias_add else bias_O
    if isinstance(linear, ColumnParallelLinear):
        assert not (linear.gather_output or linear.disable_grad_reduce)
        if linear.sequence_parallel:
            input_t1I = gather_from_sequence_parallel_region(input_t1I, group=group)
        else:
            input_t1I = copy_to_tensor_model_parallel_region(input_t1I, group=group)
        output_t1O = frozen_linear(input_t1I, linear.weight, added_bias_O, low_rank)
    else:
        assert linear.input_is_parallel
        partial_T1O = frozen_linear(input_t1I, linear.weight, None, low_rank)
        if linear.sequence_parallel:
            output_t1O = reduce_scatter_to_sequence_parallel_region(partial_T1O, group=group)
        else:
            output_t1O = reduce_from_tensor_model_parallel_region(partial_T1O, group=group)
        if added_bias_O is not None:
            output_t1O = output_t1O + added_bias_O
    return output_t1O, bias_O if linear.skip_bias_add else None


def forward_with_input(linear: ParallelLinear) -> ForwardWithInput:
    """The linear's present `forward`, which also returns the input of its product.

    Under sequence parallelism the input is this rank's shard, as without a norm.
    """
    forward = linear.forward

    def plain(input_t1I: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return input_t1I, *forward(input_t1I, *args, **kwargs)

    def with_norm(hidden_t1I: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        linear.return_layernorm_output = True
        try:
            result = forward(hidden_t1I, *args, **kwargs)
        finally:
            linear.return_layernorm_output = False
        if linear.te_return_bias:
            output_t1O, bias_O, input_t1I = result
        else:
            # megatron-core's wrapper appends a bias of None to what it takes for the output.
            (output_t1O, input_t1I), bias_O = result
        return input_t1I, output_t1O, bias_O

    return with_norm if isinstance(linear, _WITH_NORM) else plain

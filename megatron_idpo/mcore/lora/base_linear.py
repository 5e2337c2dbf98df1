"""The linears that an adapter can be added to: megatron-core's own and Transformer Engine's.

Transformer Engine fuses the norm before attention and before the MLP with the linear after it. The
adapter's input is the norm's output, which the linear returns if `return_layernorm_output` is set.
It is the tensor that it keeps for its backward pass anyway.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

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

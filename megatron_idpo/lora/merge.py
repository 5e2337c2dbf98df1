"""Adapters merged into the weights they belong to, one parameter at a time.

export_hf(chunks, architecture, companions, target, dtype=dtype, value=merged_value(adapters))
merge_for_good(adapters)             # the chunks' own weights; the adapters are zero after it
"""

import torch
from torch import Tensor

from megatron_idpo.convert.megatron_to_hf import ParameterValue
from megatron_idpo.lora.adapters import Adapters


def merged_value(adapters: Adapters) -> ParameterValue:
    """What a parameter of an adapted chunk is with its adapters merged in.

    `W + scaling * B A` of this rank's shard is computed in fp32 and cast once, to the parameter's
    format. Nothing is changed, and nothing held beyond the parameter in question. Parameters
    without adapters are their own data.
    """
    by_weight = {
        id(one.linear.weight): one
        for chunk_adapters in adapters.by_chunk
        for _, _, one in chunk_adapters.linears()
    }

    def value(parameter: torch.nn.Parameter) -> Tensor:
        adapted = by_weight.get(id(parameter))
        return parameter.data if adapted is None else adapted.merged_weight()

    return value


def merge_for_good(adapters: Adapters) -> None:
    """Replace the weights by their merged values, and let the adapters change nothing any more.

    The same values as `merged_value`'s. What was is lost, and an optimizer's own copies of the
    adapters do not know of it: nothing is to be trained with them after this.
    """
    with torch.no_grad():
        for chunk_adapters in adapters.by_chunk:
            for _, _, one in chunk_adapters.linears():
                one.linear.weight.copy_(one.merged_weight())
        for tensor in adapters.tensors():
            if tensor.side == "B":
                tensor.parameter.zero_()

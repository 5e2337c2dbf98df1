"""Layer inputs in the host's memory, for models whose layers are recomputed.

With `training.recompute: full` the largest tensors that a step keeps are the inputs of the layers,
`positions · hidden` each. The hooks of torch's saved tensors copy them to pinned memory of the host
as they are saved, and back when the backward pass needs them, one layer at a time. Everything else
that is saved stays on the device.

The copies run on the compute stream, in order with the kernels that write the tensor and that
reuse its memory: no stream has to wait for another, and nothing is waited for on the host. A layer
computes for much longer than its input takes to copy (docs/long_context.md).

Shape suffixes: `S` positions of this rank, `B` batch, `H` hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_idpo.mcore.cpu.redirect import to_device

type _Kept = Tensor | tuple[Tensor, torch.device]
"""A saved tensor, or its copy on the host and the device that it was on."""


def offload_layer_inputs(chunks: Sequence[Any]) -> None:
    """Keep the inputs of these chunks' layers on the host between forward and backward pass.

    Affects what `decoder.forward` saves. Tensors that a recomputation in the backward pass saves
    stay on the device.

    Args:
        chunks: `GPTModel`s, not wrapped.
    """
    for chunk in chunks:
        decoder = chunk.decoder
        decoder.forward = partial(_forward, decoder.forward, chunk.config.hidden_size)


def _forward(forward: Callable[..., Any], hidden_size: int, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with saved_tensors_hooks(partial(_to_host, hidden_size), _from_host):
        return forward(*args, **kwargs)


def _to_host(hidden_size: int, saved: Tensor) -> _Kept:
    # Hidden states are `[S, B, H]`; parameters and rotary angles have other shapes.
    if saved.dim() != 3 or saved.shape[-1] != hidden_size:
        return saved
    # torch keeps pinned memory that was freed until its copies have ended.
    host_SBH = torch.empty(
        saved.shape, dtype=saved.dtype, device="cpu", pin_memory=saved.device.type == "cuda"
    )
    host_SBH.copy_(saved, non_blocking=True)
    return host_SBH, saved.device


def _from_host(kept: _Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else to_device(*kept)

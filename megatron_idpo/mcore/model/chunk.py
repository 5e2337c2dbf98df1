"""What the plugin needs of a megatron-core model chunk: its layers' outputs, its norm, its head.

The places where megatron-core 0.19 is entered besides its public calls: the `forward` of a chunk's
decoder and of its output layer are replaced *on the instance*, and put back by what these functions
return. Nothing is patched on classes or modules.

    T  row positions (t: this rank's shard of them under sequence parallelism)   H  hidden size
    N  gathered positions   V  this rank's rows of the vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

Undo = Callable[[], None]
OnTaps = Callable[[Tensor, dict[int, Tensor], Any], Tensor]
"""Takes a chunk's output `[t, 1, H]`, its tapped layers' outputs by layer (from 1) and the
micro-batch (`packed_seq_params`); returns the output, perhaps with more behind it in the graph."""


def chunk_layer_numbers(chunk: GPTModel) -> list[int]:
    """The layers that a chunk owns, counted from 1 over the whole model."""
    return [layer.layer_number for layer in chunk.decoder.layers]


def tap_layers(chunk: GPTModel, layers: Sequence[int], on_taps: OnTaps) -> Undo:
    """Let `on_taps` see the outputs of some of a chunk's layers in every forward pass.

    Uses `TransformerBlock.forward(extract_layer_indices=...)`, which hands them out from outside
    the activation checkpoint: they are computed once, also under full recomputation. Layer hooks
    would fire again in the backward pass, when a later micro-batch is the current one.

    Args:
        chunk: before it is wrapped in DDP.
        layers: counted from 1; all of them this chunk's.
        on_taps: called once per forward pass, with the layers in ascending order.
    """
    decoder = chunk.decoder
    forward = decoder.forward
    wanted = sorted(layers)
    indices = {layer - 1 for layer in wanted}

    def tapped(*args: Any, **kwargs: Any) -> Tensor:
        output, hidden = forward(*args, extract_layer_indices=indices, **kwargs)
        assert len(hidden) == len(wanted), f"{len(hidden)} of the layers {wanted} were handed out"
        taps = dict(zip(wanted, hidden, strict=True))
        output = on_taps(output, taps, kwargs.get("packed_seq_params"))
        # Output deallocation asserts that what is sent on is no view of anything.
        sent: Tensor = make_viewless_tensor(
            output, requires_grad=output.requires_grad, keep_graph=True
        )
        return sent

    decoder.forward = tapped

    def undo() -> None:
        del decoder.forward

    return undo


def is_hooked(chunk: GPTModel) -> bool:
    """Whether taps or a head have been put into this chunk and not taken out again."""
    output_layer = vars(chunk.output_layer) if chunk.post_process else {}
    return "forward" in vars(chunk.decoder) or "forward" in output_layer


def override_output_layer(chunk: GPTModel, forward: Callable[[Tensor, Any], Any]) -> Undo:
    """Let a last stage's output layer answer calls that name `response_targets` by `forward`.

    Those calls still go through the module, so that DDP's pre-hooks wait for its parameter where
    the parameters are gathered behind the forward pass (`overlap_param_gather`). Other calls get
    the logits that they always got.
    """
    layer = chunk.output_layer
    ordinary = layer.forward

    def entered(
        hidden_t1H: Tensor, *args: Any, response_targets: Any | None = None, **kwargs: Any
    ) -> Any:
        if response_targets is None:
            return ordinary(hidden_t1H, *args, **kwargs)
        return forward(hidden_t1H, response_targets)

    layer.forward = entered

    def undo() -> None:
        del layer.forward

    return undo


def enable_embedding_output_grad(chunk: GPTModel) -> Undo:
    """Make the output of a frozen embedding require a gradient.

    Otherwise `tensor_parallel.checkpoint` sees no input that does, returns a tensor without a
    graph, and the first layers' trainable parameters silently get no gradient.
    """

    def require(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        return output

    undo: Undo = chunk.embedding.register_forward_hook(require).remove
    return undo


def gather_positions(hidden_t1H: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """All positions of a row from the shards of sequence parallelism.

    Forward: an all-gather along the first dimension. Backward: a reduce-scatter, which adds up the
    partial gradients that tensor-parallel ranks have of every position.
    """
    whole_T1H: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_t1H, tensor_parallel_output_grad=True, group=group
    )
    return whole_T1H

"""Patches on a megatron-core model chunk for the plugin: layer taps and the output layer.

megatron-core 0.19 has no public hook for these, so the `forward` of a chunk's decoder or output
layer is replaced *on the instance*. Every function returns the call that restores it. No class or
module is patched.

    T  row positions (t: this rank's shard of them under sequence parallelism)   H  hidden size
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

RestoreFn = Callable[[], None]
"""Undoes a change to a chunk."""

OnTaps = Callable[[Tensor, dict[int, Tensor], Any], Tensor]
"""Takes a chunk's output `[t, 1, H]`, its tapped layers' outputs by layer (from 1) and the
micro-batch (`packed_seq_params`). Returns the output, possibly with more behind it in the graph."""


def chunk_layer_numbers(chunk: GPTModel) -> list[int]:
    """The layers that a chunk owns, counted from 1 over the whole model."""
    return [layer.layer_number for layer in chunk.decoder.layers]


def tap_layers(chunk: GPTModel, layers: Sequence[int], on_taps: OnTaps) -> RestoreFn:
    """Call `on_taps` with the outputs of some of a chunk's layers in every forward pass.

    Uses `TransformerBlock.forward(extract_layer_indices=...)`, which collects them outside the
    activation checkpoint, so they are computed once, also under full recomputation. Layer hooks
    would fire again in the backward pass, when a later micro-batch is the current one.

    Args:
        chunk: before it is wrapped in DDP.
        layers: counted from 1 over the whole model; all of them belong to this chunk.
        on_taps: called once per forward pass, with the layers in ascending order.
    """
    decoder = chunk.decoder
    forward = decoder.forward
    layers = sorted(layers)
    # megatron-core counts these over the whole model too, but from 0.
    indices = {layer - 1 for layer in layers}

    def tapped_forward(*args: Any, **kwargs: Any) -> Tensor:
        output, outputs = forward(*args, extract_layer_indices=indices, **kwargs)
        assert len(outputs) == len(layers), f"{len(outputs)} outputs for the layers {layers}"
        taps = dict(zip(layers, outputs, strict=True))
        output = on_taps(output, taps, kwargs.get("packed_seq_params"))
        # `deallocate_output_tensor` frees the storage of what was sent to the next stage, and
        # asserts that it is not a view: the storage of the base would stay.
        viewless: Tensor = make_viewless_tensor(
            output, requires_grad=output.requires_grad, keep_graph=True
        )
        return viewless

    decoder.forward = tapped_forward

    def restore() -> None:
        del decoder.forward

    return restore


def is_hooked(chunk: GPTModel) -> bool:
    """Whether taps or a head are installed in this chunk."""
    output_layer = vars(chunk.output_layer) if chunk.post_process else {}
    return "forward" in vars(chunk.decoder) or "forward" in output_layer


def override_output_layer(chunk: GPTModel, forward: Callable[[Tensor, Any], Any]) -> RestoreFn:
    """Route calls of a last stage's output layer that pass `response_targets` to `forward`.

    They still go through the module's `__call__`, so that DDP's pre-hooks wait for the weight if
    parameters are all-gathered during the forward pass (`overlap_param_gather`). Other calls return
    logits as before.
    """
    layer = chunk.output_layer
    logits_forward = layer.forward

    def overriding_forward(
        hidden_t1H: Tensor, *args: Any, response_targets: Any | None = None, **kwargs: Any
    ) -> Any:
        if response_targets is None:
            return logits_forward(hidden_t1H, *args, **kwargs)
        return forward(hidden_t1H, response_targets)

    layer.forward = overriding_forward

    def restore() -> None:
        del layer.forward

    return restore


def enable_embedding_output_grad(chunk: GPTModel) -> RestoreFn:
    """Make the output of a frozen embedding require a gradient.

    Without it, `tensor_parallel.checkpoint` sees no input that requires one, returns a tensor
    without a graph, and the first layers' trainable parameters silently get no gradient.
    """

    def require_grad(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        return output

    restore: RestoreFn = chunk.embedding.register_forward_hook(require_grad).remove
    return restore


def gather_positions(hidden_t1H: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """All positions of a row, `[T, 1, H]`, from the shards of sequence parallelism.

    Collective over `group`. Forward: an all-gather along dimension 0. Backward: a reduce-scatter,
    which sums the partial gradients that the tensor-parallel ranks have for every position.
    """
    # tensor_parallel_output_grad: each rank computes with its own part of the vocabulary, so the
    # ranks' gradients differ and must be summed; False would only slice them.
    hidden_T1H: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_t1H, tensor_parallel_output_grad=True, group=group
    )
    return hidden_T1H

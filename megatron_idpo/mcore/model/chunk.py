"""What the plugin needs to know about a model chunk: its layers, its final norm, its embedding.

megatron-core builds a language model as `GPTModel` or, from 0.19 on, as `HybridModel`, a sequence
of attention, MLP, expert and Mamba layers. This module is the only place that knows both.

    S  positions (s: this rank's shard under sequence parallelism)   B  batch   H  hidden size
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_idpo.mcore.attention.row_attention import RowAttention
from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.mcore.rope.rotary import RowRotary

type ModelChunk = GPTModel | HybridModel
"""A model, or the part of it that is on one (virtual) pipeline stage."""

RestoreFn = Callable[[], None]
"""Undoes a change to a chunk."""


def is_language_model(chunk: object) -> bool:
    """Whether this is a chunk that can be attached."""
    return isinstance(chunk, GPTModel | HybridModel)


def num_layers(chunk: ModelChunk) -> int:
    """Transformer layers of the whole model."""
    total: int = chunk.config.num_layers
    return total // 2 if _has_split_layers(chunk) else total


def layers_by_number(chunk: ModelChunk) -> dict[int, torch.nn.Module]:
    """This chunk's layers, numbered from 1 over the whole model: the modules with their outputs.

    A hybrid model that alternates attention with MLPs or experts is a `GPTModel` whose layers are
    in halves: layer i ends with hybrid layer 2i, and is numbered i. Every other hybrid model has no
    transformer layers to compare with, and keeps its own numbers.
    """
    own = {layer.layer_number: layer for layer in chunk.decoder.layers}
    if not _has_split_layers(chunk):
        return own
    return {number // 2: layer for number, layer in own.items() if number % 2 == 0}


def _has_split_layers(chunk: ModelChunk) -> bool:
    if not isinstance(chunk, HybridModel):
        return False
    main, *_ = (chunk.hybrid_layer_pattern or "").split(Symbols.MTP_SEPARATOR)
    layers = main.replace(Symbols.PIPE, "")
    first, second = layers[0::2], layers[1::2]
    return (
        bool(layers)
        and len(first) == len(second)
        and set(first) <= {Symbols.ATTENTION, Symbols.MLA}
        and set(second) <= {Symbols.MLP, Symbols.MOE}
    )


def final_norm_name(chunk: ModelChunk) -> str:
    """The final norm's name in the decoder."""
    return "final_norm" if isinstance(chunk, HybridModel) else "final_layernorm"


def final_norm(chunk: ModelChunk) -> torch.nn.Module:
    """The norm before the output layer, on the last stage."""
    norm = getattr(chunk.decoder, final_norm_name(chunk))
    return torch.nn.Identity() if norm is None else norm


def new_final_norm(chunk: ModelChunk) -> torch.nn.Module:
    """Another norm like the one before the output layer, for a stage that does not own it."""
    config = chunk.config
    if isinstance(chunk, HybridModel):
        builder = hybrid_block.TENorm
    else:
        # Every stage's block has the whole spec, but only the last stage builds the norm.
        builder = chunk.decoder.submodules.layer_norm
    norm: torch.nn.Module = builder(
        config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return norm


def logit_map(chunk: ModelChunk) -> LogitMap:
    """What the model does with the output layer's product; the same on every stage."""
    own: LogitMap = getattr(chunk, "logit_map", LogitMap())
    return own


_OWN_CODE = ("megatron.core.", "megatron_idpo.")
"""Where methods come from whose treatment of logits the taps share."""


def logit_changes(chunk: ModelChunk) -> list[str]:
    """What a last stage does between the final norm and the logits besides the projection.

    As far as it can be seen without running it. Hooks and subclasses that change what megatron-core
    returns are seen in the result.
    """
    layer = chunk.output_layer
    if not isinstance(layer, tensor_parallel.ColumnParallelLinear):
        kind = type(layer).__name__
        return [f"has a {kind} as output layer, which taps do not run: they use its weight"]
    methods = {
        type(layer).__name__: layer.forward,
        f"{type(chunk).__name__}._postprocess": getattr(chunk, "_postprocess", None),
        f"{type(chunk).__name__}._scale_logits": getattr(chunk, "_scale_logits", None),
    }
    changed_by = [
        name
        for name, method in methods.items()
        if method is not None and not str(getattr(method, "__module__", "")).startswith(_OWN_CODE)
    ]
    changed_by += [] if layer.bias is None else ["a bias"]
    changed_by += ["hooks of the output layer"] if layer._forward_pre_hooks else []
    return [f"{name} may change logits, which taps do not" for name in changed_by]


def supports_rows(chunk: ModelChunk) -> bool:
    """Whether attention and rotary embedding read the structure of shared-prompt rows."""
    attentions = [
        layer.self_attention for layer in chunk.decoder.layers if hasattr(layer, "self_attention")
    ]
    return isinstance(getattr(chunk, "rotary_pos_emb", None), RowRotary) and all(
        isinstance(getattr(attention, "core_attention", None), RowAttention)
        for attention in attentions
    )


def parameter_device(chunks: Sequence[torch.nn.Module]) -> torch.device:
    """Where the weights are: a CPU before Megatron-LM moves a model that it initialized there."""
    device: torch.device = next(p.device for chunk in chunks for p in chunk.parameters())
    return device


def enable_embedding_output_grad(chunk: ModelChunk) -> RestoreFn:
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


def gather_positions(hidden_sBH: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """All positions, `[S, B, H]`, from the shards of sequence parallelism.

    Collective over `group`. Forward: an all-gather along dimension 0. Backward: a reduce-scatter,
    which sums the partial gradients that the tensor-parallel ranks have for every position.
    """
    # tensor_parallel_output_grad: each rank computes with its own part of the vocabulary, so the
    # ranks' gradients differ and must be summed; False would only slice them.
    hidden_SBH: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_sBH, tensor_parallel_output_grad=True, group=group
    )
    return hidden_SBH

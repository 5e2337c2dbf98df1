"""Experts computed together: one grouped matrix product per linear instead of one per expert.

With 128 experts, megatron-core's `SequentialMLP` runs 256 small linears per layer, and as many in
the backward pass; launching them takes longer than computing them. Its grouped version needs
Transformer Engine. `torch.nn.functional.grouped_mm` does not. The parameters are those of
`SequentialMLP`, with their names and checkpoints; they share memory, so that a grouped product
reads them without a copy. Where they do not (a distributed optimizer moves trained ones), they are
copied for the product and not kept.

    N  tokens of this rank's experts, sorted by expert   E  experts of this rank
    I  input features   O  output features   F  features of an expert on this rank   H  hidden size
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn.functional import grouped_mm, pad, silu


class GroupedExperts(SequentialMLP):
    """`SequentialMLP` with grouped products; bias-free SwiGLU experts only."""

    add_adapters: Callable[[str, Tensor, Tensor, Tensor], Tensor] | None = None
    """Adds low-rank adapters: `ExpertAdapters.forward`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See megatron-core's class."""
        super().__init__(*args, **kwargs)
        assert self.config.gated_linear_unit and self.config.activation_func is silu
        assert not self.config.add_bias_linear and not self.config.moe_apply_probs_on_input
        for linears in self._linears():
            _share_memory([linear.weight for linear in linears])

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Outputs of the experts, weighted: `[N, H]`.

        Args:
            permuted_local_hidden_states: `[N, H]`, sorted by expert.
            tokens_per_expert: int `[E]`, their sum is N.
            permuted_probs: `[N]`, the weight of each token's expert.
        """
        tokens_NH, num_tokens = permuted_local_hidden_states, len(permuted_local_hidden_states)
        ends_E = tokens_per_expert.to(tokens_NH.device).cumsum(0).to(torch.int32)
        if not num_tokens:
            # No expert of this rank was chosen. A token of zeros, which is dropped below, gives
            # every parameter the gradient that DDP waits for.
            tokens_NH, permuted_probs = pad(tokens_NH, (0, 0, 0, 1)), pad(permuted_probs, (0, 1))
            ends_E = ends_E + 1
        fused_N2F = self._grouped_linear("linear_fc1", tokens_NH, ends_E)
        gate_NF, up_NF = fused_N2F.chunk(2, dim=-1)
        weighted_NF = silu(gate_NF) * up_NF * permuted_probs[:, None]
        output_NH = self._grouped_linear("linear_fc2", weighted_NF.to(fused_N2F.dtype), ends_E)
        return output_NH[:num_tokens], None

    def _grouped_linear(self, name: str, tokens_NI: Tensor, ends_E: Tensor) -> Tensor:
        """One linear of each expert, with its adapters."""
        linears = [getattr(expert, name) for expert in self.local_experts]
        output_NO = _grouped_linear(tokens_NI, ends_E, linears)
        if self.add_adapters is None:
            return output_NO
        return self.add_adapters(name, tokens_NI, ends_E, output_NO)

    def _linears(self) -> tuple[list[Any], list[Any]]:
        experts = list(self.local_experts)
        return [expert.linear_fc1 for expert in experts], [expert.linear_fc2 for expert in experts]


def _share_memory(weights: Sequence[torch.nn.Parameter]) -> None:
    """Put the weights one after another into one tensor."""
    together = torch.stack([weight.data for weight in weights])
    for weight, part in zip(weights, together, strict=True):
        weight.data = part


def _grouped_linear(tokens_NI: Tensor, ends_E: Tensor, linears: Sequence[Any]) -> Tensor:
    for linear in linears:
        # The linears are not called, but DDP waits in their hooks for an all-gather of their
        # weights (`overlap_param_gather`).
        for hook in linear._forward_pre_hooks.values():
            hook(linear, ())
    output: Tensor = _GroupedLinear.apply(tokens_NI, ends_E, *(linear.weight for linear in linears))
    return output


class _GroupedLinear(torch.autograd.Function):
    """`tokens @ weight.T` with the weight of each token's expert."""

    @staticmethod
    def forward(ctx: Any, tokens_NI: Tensor, ends_E: Tensor, *weights_OI: Tensor) -> Tensor:
        # The weights themselves, not a stacked copy of them, live until the backward pass.
        ctx.save_for_backward(tokens_NI, ends_E, *weights_OI)
        return grouped_mm(tokens_NI, _stacked(weights_OI).transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        tokens_NI, ends_E, *weights_OI = ctx.saved_tensors
        grad_NO, grad_NI = grad_NO.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_NI = grouped_mm(grad_NO, _stacked(weights_OI), offs=ends_E)
        if not any(ctx.needs_input_grad[2:]):
            return grad_NI, None, *(None for _ in weights_OI)
        grad_EOI = grouped_mm(grad_NO.transpose(0, 1), tokens_NI, offs=ends_E)
        return grad_NI, None, *grad_EOI.unbind()


def _stacked(weights_OI: Sequence[Tensor]) -> Tensor:
    """`[E, O, I]`: a view if the weights lie one after another in memory, else a copy."""
    first = weights_OI[0]
    storage, start, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    in_order = all(
        weight.untyped_storage().data_ptr() == storage
        and weight.storage_offset() == start + index * size
        for index, weight in enumerate(weights_OI)
    )
    if in_order:
        strides = (size, *first.stride())
        return first.detach().as_strided((len(weights_OI), *first.shape), strides, start)
    return torch.stack([weight.detach() for weight in weights_OI])

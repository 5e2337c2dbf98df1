"""Mixture-of-experts layers for packed rows.

Padding never reaches the router: `RowMoELayer` routes the positions that hold tokens and returns
zeros elsewhere, so padding costs no expert any work, and is in no statistic. Routing is dropless:
what a position gets depends on nothing but its own hidden state.

The load-balancing loss is that of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961,
Eq. 4-6) for each group of a row (a pair that shares its prompt, or one plain sequence) and layer:

    E / (K n^2) * sum over experts of (tokens of the expert) * (sum of its router probabilities)

with n tokens and K of E experts per token; it is 1 where the router is balanced. A group is within
one row and one data-parallel rank, so its loss is the same in every layout, unlike that of a whole
micro-batch, whose groups depend on the packing. It is averaged over the pairs of the global batch,
like DPO's own loss, and summed over the layers. megatron-core's own losses stay off.

    N  routed tokens of this rank   E  experts   G  groups of the row   H  hidden size
    S  positions of this rank   B  batch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_idpo.mcore.attention.row_params import RowParams


class RowTransformerLayer(TransformerLayer):
    """A layer that gives its experts the row."""

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        padding_mask: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        # As the padding mask, which megatron-core only hands on: a row says where the padding is,
        # and which positions belong together.
        if isinstance(packed_seq_params, RowParams) and isinstance(self.mlp, RowMoELayer):
            padding_mask = packed_seq_params
        return super()._forward_mlp(
            hidden_states, inference_context, padding_mask, packed_seq_params
        )


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTokens:
    """The positions of this rank that hold tokens of a row.

    Without any, the first position takes part and counts as nothing: megatron-core's router and
    all-to-all cannot do without a token, and the other ranks wait for this one.
    """

    position_N: Tensor
    group_N: Tensor
    num_groups: int
    group_weight: float
    """What a group contributes to the mean over the global batch."""

    is_placeholder: bool
    """Whether the position is padding."""

    @classmethod
    def of(cls, row: RowParams, device: torch.device, rank: int, size: int) -> "RoutedTokens":
        """Those of part `rank` of `size` equal parts of this rank's positions of the row.

        Context-parallel ranks have different positions; sequence parallelism splits them further.
        Computed once per row.
        """
        key = ("routed tokens", rank, size)
        if key not in row.derived:
            part = row.own_tokens // size
            group_T = torch.full((row.row_tokens,), -1)
            for group, (start, _, _, stop) in enumerate(row.groups):
                group_T[start:stop] = group
            own_S = row.own_positions_L[rank * part : (rank + 1) * part]
            group_S = group_T[torch.from_numpy(own_S)]
            (position_N,) = (group_S >= 0).nonzero(as_tuple=True)
            is_placeholder = not len(position_N)
            if is_placeholder:
                position_N = torch.zeros(1, dtype=torch.int64)
            row.derived[key] = cls(
                position_N.to(device),
                group_S[position_N].clamp(min=0).to(device),
                len(row.groups),
                row.group_weight,
                is_placeholder,
            )
        routed: RoutedTokens = row.derived[key]
        return routed


class RowMoELayer(MoELayer):
    """megatron-core's layer of experts without padding and token dropping."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Any = None
    ) -> tuple[Tensor, None]:
        """Route, compute and combine.

        Collective over the expert-parallel and the expert-tensor-parallel group: an all-to-all of
        tokens to their experts and one back, forward and backward. A shared expert is tensor-
        parallel like an MLP.

        Args:
            hidden_states: `[S, B, H]`.
            intermediate_tensors: not used.
            padding_mask: the row (`RowTransformerLayer`); without one every position is routed.
        """
        assert intermediate_tensors is None
        flat_NH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = None
        if isinstance(padding_mask, RowParams):
            is_split = self.config.sequence_parallel
            rank = self.attn_tp_group.rank() if is_split else 0
            size = self.attn_tp_group.size() if is_split else 1
            routed = RoutedTokens.of(padding_mask, hidden_states.device, rank, size)
            flat_NH = flat_NH.index_select(0, routed.position_N)
        probs_NE, is_chosen_NE = self.router(flat_NH[:, None], routed)
        sent, probs = self.preprocess(flat_NH[:, None], probs_NE, is_chosen_NE)
        received, probs = self.dispatch(sent, probs)
        computed, _ = self.routed_experts_compute(received, probs)
        output_NH = self.postprocess(self.combine(computed), None).view(flat_NH.shape)
        if routed is not None:
            whole = output_NH.new_zeros(
                hidden_states.numel() // output_NH.shape[-1], output_NH.shape[-1]
            )
            output_NH = whole.index_copy(0, routed.position_N, output_NH)
        output_SBH = output_NH.view(hidden_states.shape)
        if self.use_shared_expert:
            # Position by position, also of padding, which nothing reads.
            output_SBH = output_SBH + self.shared_experts(hidden_states)
        return output_SBH, None


class RowRouter(TopKRouter):
    """megatron-core's top-k router, with the load-balancing loss of this module and counts.

    The coefficient of the loss is `TransformerConfig.moe_aux_loss_coeff`, which megatron-core does
    not read with the balancing type "none".
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        """See megatron-core's class."""
        super().__init__(config, pg_collection, is_mtp_layer)
        assert self.routing_type == "none" and config.moe_expert_capacity_factor is None
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget what was counted."""
        self.num_tokens_E: Tensor | None = None
        self.balance_loss: Tensor | None = None

    def forward(self, input: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of the experts of each token, `[N, E]` each.

        Collective with the loss switched on, over the context-parallel group, with sequence
        parallelism over tensor- and context-parallel ranks: an all-reduce of counts, forward only.

        Args:
            input: `[N, 1, H]`.
            padding_mask: `RoutedTokens` of the row; None: no row, hence no loss.
        """
        logits_N1E = self.gating(input)
        probs_NE, is_chosen_NE = self.routing(logits_N1E)
        # Without gradients it is an evaluation, or the first run of a recomputed layer.
        if self.training and torch.is_grad_enabled():
            routed: RoutedTokens | None = padding_mask
            if routed is None or not routed.is_placeholder:
                self._count(is_chosen_NE)
            if routed is not None and routed.num_groups and self.config.moe_aux_loss_coeff:
                scores_NE = torch.softmax(logits_N1E[:, 0], dim=-1, dtype=torch.float32)
                loss = self._balance_loss(scores_NE, is_chosen_NE, routed)
                probs_NE = _AddedLoss.apply(probs_NE, self._scaled(loss))
        return probs_NE, is_chosen_NE

    def _count(self, is_chosen_NE: Tensor) -> None:
        counts_E = is_chosen_NE.sum(dim=0)
        self.num_tokens_E = counts_E if self.num_tokens_E is None else self.num_tokens_E + counts_E

    def _balance_loss(
        self, scores_NE: Tensor, is_chosen_NE: Tensor, routed: RoutedTokens
    ) -> Tensor:
        """This rank's part of the loss: its sum over tensor- and context-parallel ranks."""
        shape = (routed.num_groups, scores_NE.shape[1])
        chosen_NE = is_chosen_NE.float()
        if routed.is_placeholder:
            chosen_NE, scores_NE = 0 * chosen_NE, 0 * scores_NE
        chosen_GE = scores_NE.new_zeros(shape).index_add(0, routed.group_N, chosen_NE)
        # The ranks that share the positions of a row. Its groups, and so this collective, are the
        # same on all of them.
        sharing = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
        if sharing.size() > 1:
            torch.distributed.all_reduce(chosen_GE, group=sharing)
        scores_GE = scores_NE.new_zeros(shape).index_add(0, routed.group_N, scores_NE)
        # K n: each token has K experts. An empty group has none, and a loss of 0.
        assignments_G = chosen_GE.sum(dim=1).clamp(min=1)
        factor = shape[1] * self.topk
        loss_G = factor * (chosen_GE * scores_GE).sum(dim=1) / assignments_G**2
        loss: Tensor = routed.group_weight * loss_G.sum()
        own = loss.detach()
        self.balance_loss = own if self.balance_loss is None else self.balance_loss + own
        return loss

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss for the backward pass: DDP divides by data- and context-parallel ranks."""
        assert not self.config.calculate_per_token_loss, "DDP would not divide by the ranks"
        data_ranks = self.tp_dp_cp_group.size() // self.tp_group.size()
        loss = loss * (self.config.moe_aux_loss_coeff * data_ranks)
        scale = self.config.grad_scale_func
        scaled: Tensor = loss if scale is None else scale(loss)
        return scaled


class _AddedLoss(torch.autograd.Function):
    """`probs`, whose backward pass also starts the one of `loss`."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, grad_probs: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_probs, torch.ones_like(loss)


def routers(chunks: Sequence[torch.nn.Module]) -> dict[int, RowRouter]:
    """The routers of this rank's chunks, by layer, counted from 1 over the whole model."""
    found = (module for chunk in chunks for module in chunk.modules())
    return {int(router.layer_number): router for router in found if isinstance(router, RowRouter)}


def reset_statistics(chunks: Sequence[torch.nn.Module]) -> None:
    """Forget what the routers of this rank have counted in passes outside steps."""
    for router in routers(chunks).values():
        router.reset_statistics()


def take_statistics(chunks: Sequence[torch.nn.Module], num_layers: int) -> Tensor | None:
    """What the routers of this rank have counted since the last call, float64 `[layers, E + 1]`.

    The tokens of each expert, and the layer's load-balancing loss; zero for layers of other
    stages and for those without experts. Its sum over all ranks is the whole model's. None for a
    dense model.
    """
    config: Any = chunks[0].config
    num_experts: int | None = config.num_moe_experts
    if num_experts is None:
        return None
    device = next(chunks[0].parameters()).device
    table = torch.zeros(num_layers, num_experts + 1, dtype=torch.float64, device=device)
    for layer, router in routers(chunks).items():
        if router.num_tokens_E is not None:
            table[layer - 1, :-1] = router.num_tokens_E
        if router.balance_loss is not None:
            table[layer - 1, -1] = router.balance_loss
        router.reset_statistics()
    return table

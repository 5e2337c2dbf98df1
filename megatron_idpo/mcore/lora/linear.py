"""Low-rank adapters for one of megatron-core's fused, tensor-parallel linears.

megatron-core fuses q, k and v into `linear_qkv`, and gate and up into `linear_fc1`. Each projection
still has a separate adapter, as in PEFT: `A [r, I]`, `B [O_p, r]` and a dropout mask. They are
computed together: one product with all A's (without dropout), then the products with the B's, added
to the fused linear's output: in place in fp32, before it is rounded in 16 bits (`rounds_once`).

Tensor-parallel ranks exchange the low-rank activation, of width R instead of I or O:

    column-parallel (qkv, fc1): A is replicated, B is sharded like the linear's rows. Without
        sequence parallelism the low-rank gradient is all-reduced in the backward pass, so A's
        gradient is complete. With it the low-rank activation is all-gathered, and A's gradient
        covers this rank's positions only; `finalize_model_grads` sums it (`sequence_parallel`).
    row-parallel (proj, fc2): A is sharded like the linear's columns, B is replicated. The low-rank
        activation is all-reduced; with sequence parallelism it is reduce-scattered along the
        positions, and B's gradient covers this rank's positions only. If the linear rounds once,
        each rank adds what its own columns contribute, before the linear's sum over ranks, and
        there is no exchange. B's gradient then covers this rank's columns only and is all-reduced;
        with sequence parallelism `finalize_model_grads` sums it too.

    T  row positions (t: this rank's under sequence parallelism)   I  input features of this rank
    O  output features of this rank   r  rank   R  r for each projection with an adapter
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from megatron_idpo.mcore.lora.base_linear import COLUMN, ParallelLinear, rounds_once
from megatron_idpo.mcore.lora.products import WHOLE, LowRank, Part, block_diagonal, dropout_linear

_MAX_PARTS = 12
"""Maximum number of products per linear to add the B's; beyond it, one product with zeros."""


@dataclass(frozen=True, slots=True)
class FusedRows:
    """Which rows of a fused linear's weight belong to which projection, on one TP rank.

    The weight consists of equal groups of rows (one per query group for q, k and v; a single one
    for gate and up). Each group contains rows of every projection, in order.
    """

    groups: int
    group_rows: Mapping[str, int]
    """Rows of each projection in one group, in order."""

    def slices(self, projection: str) -> list[slice]:
        """The projection's rows in each group, in ascending order."""
        names = list(self.group_rows)
        ends = [0, *accumulate(self.group_rows.values())]
        start, stop = ends[names.index(projection)], ends[names.index(projection) + 1]
        group_size = ends[-1]
        return [
            slice(group * group_size + start, group * group_size + stop)
            for group in range(self.groups)
        ]

    def rows(self, projection: str) -> int:
        """Number of rows of the projection on this rank."""
        return self.groups * self.group_rows[projection]


@dataclass(frozen=True, slots=True)
class LoraHyperparams:
    """Hyperparameters that all adapters share."""

    rank: int
    scaling: float
    dropout: float
    gate_up_rank: int = 0
    """Of the experts' `gate_up_proj`, if it is not `rank`."""


class LinearAdapters(torch.nn.Module):
    """The adapters of one linear: parameters `q_proj_A`, `q_proj_B` and so on.

    They have the linear's dtype. If it has 16 bits, the optimizer keeps fp32 main copies, as of any
    parameter; PEFT keeps the adapters themselves in fp32.
    """

    def __init__(
        self,
        linear: ParallelLinear,
        rows: FusedRows,
        targets: Sequence[str],
        hyperparams: LoraHyperparams,
    ) -> None:
        """Allocate A (uninitialised) and B (zeros) for each target.

        Args:
            linear: the adapted linear; it does not become a submodule.
            rows: the layout of its weight.
            targets: the projections that get an adapter, in the order of `rows`.
            hyperparams: rank, scale and dropout.
        """
        super().__init__()
        self.targets = tuple(targets)
        self.rows = rows
        self.hyperparams = hyperparams
        self.is_column_parallel = isinstance(linear, COLUMN)
        self._tensor_group: torch.distributed.ProcessGroup = linear.tp_group
        self._is_parallel = linear.tp_group.size() > 1
        self._is_sequence_parallel = self._is_parallel and bool(linear.sequence_parallel)
        self._adds_own_columns = rounds_once(linear) and not self.is_column_parallel
        # In a list, so that the frozen weights are not parameters of this module.
        self._linear = [linear]
        for name in self.targets:
            self._allocate(linear.weight, name)
        self._parts = self._product_parts()

    @property
    def linear(self) -> ParallelLinear:
        """The adapted linear."""
        return self._linear[0]

    def down(self, projection: str) -> torch.nn.Parameter:
        """A of a projection, `[r, I]`; replicated if column-parallel, else sharded."""
        parameter = getattr(self, f"{projection}_A")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def up(self, projection: str) -> torch.nn.Parameter:
        """B of a projection, `[O_p, r]`, rows as in Hugging Face; replicated if row-parallel."""
        parameter = getattr(self, f"{projection}_B")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def forward(self, input_t1I: Tensor) -> LowRank:
        """The adapters' part of the linear's output.

        Collective over the tensor-parallel group, forward or backward; see the module docstring.

        Args:
            input_t1I: the linear's input, this rank's shard of it.
        """
        low_rank_TR = self._low_rank(input_t1I.flatten(0, 1))
        if self._parts == WHOLE:
            ups = [self.fused_up()]
        else:
            ups = [self.up(name) for name in self.targets]
        if not self._adds_own_columns:
            low_rank_TR = self._exchange(low_rank_TR)
        elif self._is_parallel and not self._is_sequence_parallel:
            ups = [copy_to_tensor_model_parallel_region(up, group=self._tensor_group) for up in ups]
        return LowRank(low_rank_TR, ups, self.hyperparams.scaling, self._parts)

    def fused_up(self) -> Tensor:
        """All B's with rows in the fused order, `[O, R]`: block-diagonal within each group."""
        if len(self.rows.group_rows) == 1:
            return self.up(self.targets[0])
        blocks = [(self.rows.slices(name)[0], self.up(name)) for name in self.targets]
        return block_diagonal(blocks, self.rows.groups, sum(self.rows.group_rows.values()))

    def fused_down(self) -> Tensor:
        """All A's concatenated, `[R, I]`."""
        downs: list[Tensor] = [self.down(name) for name in self.targets]
        return torch.cat(downs) if len(downs) > 1 else downs[0]

    def merged_weight(self) -> Tensor:
        """This rank's shard of the linear's weight with the adapters merged, in fp32."""
        weight_OI = self.linear.weight.detach()
        up_OR, down_RI = self.fused_up().detach().float(), self.fused_down().detach().float()
        return torch.addmm(weight_OI.float(), up_OR, down_RI, alpha=self.hyperparams.scaling)

    def _allocate(self, weight_OI: Tensor, name: str) -> None:
        rank, rows = self.hyperparams.rank, self.rows.rows(name)
        down = torch.nn.Parameter(weight_OI.new_empty(rank, weight_OI.shape[1]))
        up = torch.nn.Parameter(weight_OI.new_zeros(rows, rank))
        # Also without tensor parallelism, like megatron-core's linears. With it, the gradient norm
        # counts sharded parameters on every rank and replicated ones once, and `sequence_parallel`
        # makes `finalize_model_grads` sum a replicated parameter's partial gradients.
        sharded, replicated = (up, down) if self.is_column_parallel else (down, up)
        dim = 0 if self.is_column_parallel else 1
        set_tensor_model_parallel_attributes(sharded, is_parallel=True, dim=dim, stride=1)
        setattr(replicated, "sequence_parallel", self._is_sequence_parallel)  # noqa: B010 - not a Tensor field
        self.register_parameter(f"{name}_A", down)
        self.register_parameter(f"{name}_B", up)

    def _low_rank(self, input_tI: Tensor) -> Tensor:
        """All A's products with the input, `[t, R]`; each target has a separate dropout mask."""
        if not (self.training and self.hyperparams.dropout):
            return torch.nn.functional.linear(input_tI, self.fused_down())
        downs = [self.down(name) for name in self.targets]
        with self._mask_generator():
            return dropout_linear(input_tI, downs, self.hyperparams.dropout)

    def _mask_generator(self) -> Any:
        """A context with the generator for dropout masks.

        Ranks with the same input must draw the same mask: torch's default generator, which
        tensor-parallel ranks share. Ranks with different shards of the input must draw different
        masks: megatron-core's tracker.
        """
        is_same_input = self.is_column_parallel and not self._is_sequence_parallel
        if is_same_input or not self._is_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def _exchange(self, low_rank_tR: Tensor) -> Tensor:
        """The exchange between tensor-parallel ranks; see the module docstring.

        Collective. Column-parallel: `[t, R]` to `[T, R]`, or unchanged with an all-reduce backward.
        Row-parallel: the sum over ranks, `[T, R]` or this rank's `[t, R]` of it.
        """
        group = self._tensor_group
        if not self._is_parallel:
            return low_rank_tR
        exchanged: Tensor
        if self.is_column_parallel and self._is_sequence_parallel:
            exchanged = gather_from_sequence_parallel_region(low_rank_tR, group=group)
        elif self.is_column_parallel:
            exchanged = copy_to_tensor_model_parallel_region(low_rank_tR, group=group)
        elif self._is_sequence_parallel:
            exchanged = reduce_scatter_to_sequence_parallel_region(low_rank_tR, group=group)
        else:
            exchanged = reduce_from_tensor_model_parallel_region(low_rank_tR, group=group)
        return exchanged

    def _product_parts(self) -> tuple[Part, ...]:
        """The products to add to the output: one per target and group of rows.

        If there are many small ones, a single product with `fused_up` is faster despite its zeros;
        on a GPU, if there is more than one per target.
        """
        if len(self.rows.group_rows) == 1:
            return WHOLE
        if self.rows.groups > 1 and self.linear.weight.is_cuda:
            return WHOLE
        parts = []
        for index, name in enumerate(self.targets):
            height = self.rows.group_rows[name]
            for group, features in enumerate(self.rows.slices(name)):
                parts.append((features, index, slice(group * height, (group + 1) * height)))
        return tuple(parts) if len(parts) <= _MAX_PARTS else WHOLE

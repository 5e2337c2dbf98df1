"""Low-rank adapters beside one of megatron-core's fused, tensor-parallel linears.

megatron-core fuses q, k and v into `linear_qkv` and gate and up into `linear_fc1`. Each projection
has an adapter of its own all the same, as PEFT has it: `A [r, I]`, `B [O_p, r]`, a dropout mask.
They are computed together: one product with all A's (without dropout), then the products with the
B's added in place to the fused linear's output.

What travels between tensor-parallel ranks is the low-rank activation, R wide instead of I or O:

    column-parallel (qkv, fc1): A whole on every rank, B cut like the linear's rows. Without
        sequence parallelism the low-rank gradient is summed over the ranks in the backward pass, so
        A's gradient is whole. With it the low-rank activation is gathered, and A's gradient is the
        part of this rank's positions, which `finalize_model_grads` sums (`sequence_parallel`).
    row-parallel (proj, fc2): A cut like the linear's columns, B whole. The low-rank activation is
        summed over the ranks; with sequence parallelism each keeps its positions of the sum, and
        B's gradient is a part.

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
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from megatron_idpo.mcore.lora.products import WHOLE, Part, add_low_rank, dropout_linear

type ParallelLinear = Any
"""A `ColumnParallelLinear` or a `RowParallelLinear`; megatron-core has no types for us."""

_MOST_PARTS = 12
"""In how many products the B's of one linear are added at most."""


@dataclass(frozen=True, slots=True)
class FusedRows:
    """Which rows of a fused linear's output are whose, on one tensor-parallel rank.

    The rows are so many equal groups (query groups of q, k and v; one of gate and up), each with
    some rows of every projection in turn.
    """

    groups: int
    group_rows: Mapping[str, int]
    """Rows of each projection in one group, in their order."""

    def slices(self, projection: str) -> list[slice]:
        """The projection's rows in each group, in the order of its own rows."""
        names = list(self.group_rows)
        ends = [0, *accumulate(self.group_rows.values())]
        start, stop = ends[names.index(projection)], ends[names.index(projection) + 1]
        step = ends[-1]
        return [slice(n * step + start, n * step + stop) for n in range(self.groups)]

    def rows(self, projection: str) -> int:
        """How many rows the projection has here."""
        return self.groups * self.group_rows[projection]


@dataclass(frozen=True, slots=True)
class LoraHyperparams:
    """The numbers that all adapters share."""

    rank: int
    scaling: float
    dropout: float


class LinearAdapters(torch.nn.Module):
    """The adapters of one linear: parameters `q_proj_A`, `q_proj_B` and so on.

    They are in the linear's own number format. Where that has 16 bits the optimizer keeps fp32 main
    copies, as of any parameter; PEFT would keep the adapters themselves in fp32.
    """

    def __init__(
        self,
        linear: ParallelLinear,
        rows: FusedRows,
        targets: Sequence[str],
        numbers: LoraHyperparams,
    ) -> None:
        """Allocate A (uninitialised) and B (zeros) for each target.

        Args:
            linear: stays whoever's it is; it is not made a submodule.
            rows: how its output is made up.
            targets: the projections that get an adapter, in the order of `rows`.
            numbers: rank, scale and dropout.
        """
        super().__init__()
        self.targets = tuple(targets)
        self.rows = rows
        self.numbers = numbers
        self.is_column_parallel = isinstance(linear, ColumnParallelLinear)
        self._tensor_group: torch.distributed.ProcessGroup = linear.tp_group
        self._is_parallel = linear.tp_group.size() > 1
        self._is_sequence_parallel = self._is_parallel and bool(linear.sequence_parallel)
        # Parameters of the frozen model; a list keeps them out of this module's own.
        self._linear = [linear]
        for name in self.targets:
            self._allocate(linear.weight, name)
        self._parts = self._product_parts()

    @property
    def linear(self) -> ParallelLinear:
        """The adapted linear."""
        return self._linear[0]

    def down(self, projection: str) -> torch.nn.Parameter:
        """A of a projection, `[r, I]`; whole on every rank if column-parallel."""
        parameter = getattr(self, f"{projection}_A")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def up(self, projection: str) -> torch.nn.Parameter:
        """B of a projection, `[O_p, r]`, rows as Hugging Face has them; whole if row-parallel."""
        parameter = getattr(self, f"{projection}_B")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def forward(self, input_t1I: Tensor, output_t1O: Tensor) -> Tensor:
        """Add what the adapters make of the linear's input to its output, in place.

        Collective over the tensor-parallel group, forward or backward, see the module.

        Args:
            input_t1I: the linear's input, this rank's shard of it.
            output_t1O: the linear's output, which nobody else has seen yet.
        """
        low_rank_tR = self._exchange(self._low_rank(input_t1I.flatten(0, 1)))
        if self._parts == WHOLE:
            ups = [self.fused_up()]
        else:
            ups = [self.up(name) for name in self.targets]
        return add_low_rank(output_t1O, low_rank_tR, ups, self.numbers.scaling, self._parts)

    def fused_up(self) -> Tensor:
        """All B's as the fused output has their rows, `[O, R]`: a block for each, else zero."""
        if len(self.rows.group_rows) == 1:
            return self.up(self.targets[0])
        rank, width = self.numbers.rank, self.numbers.rank * len(self.targets)
        blocks = []
        for name, rows in self.rows.group_rows.items():
            if name in self.targets:
                before = self.targets.index(name) * rank
                by_group = self.up(name).unflatten(0, (self.rows.groups, rows))
                block = torch.nn.functional.pad(by_group, (before, width - before - rank))
            else:
                block = self.up(self.targets[0]).new_zeros(self.rows.groups, rows, width)
            blocks.append(block)
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def fused_down(self) -> Tensor:
        """All A's below each other, `[R, I]`."""
        downs: list[Tensor] = [self.down(name) for name in self.targets]
        return torch.cat(downs) if len(downs) > 1 else downs[0]

    def merged_weight(self) -> Tensor:
        """This rank's shard of the linear's weight with the adapters in it, computed in fp32."""
        weight_OI = self.linear.weight.detach()
        up_OR, down_RI = self.fused_up().detach().float(), self.fused_down().detach().float()
        merged_OI = torch.addmm(weight_OI.float(), up_OR, down_RI, alpha=self.numbers.scaling)
        return merged_OI.to(weight_OI.dtype)

    def _allocate(self, weight_OI: Tensor, name: str) -> None:
        rank, rows = self.numbers.rank, self.rows.rows(name)
        down = torch.nn.Parameter(weight_OI.new_empty(rank, weight_OI.shape[1]))
        up = torch.nn.Parameter(weight_OI.new_zeros(rows, rank))
        # Also without tensor parallelism, where linears mark their weights, too.
        cut, whole = (up, down) if self.is_column_parallel else (down, up)
        dim = 0 if self.is_column_parallel else 1
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=dim, stride=1)
        setattr(whole, "sequence_parallel", self._is_sequence_parallel)  # noqa: B010 - not a Tensor field
        self.register_parameter(f"{name}_A", down)
        self.register_parameter(f"{name}_B", up)

    def _low_rank(self, input_tI: Tensor) -> Tensor:
        """All A's products with the input, `[t, R]`; dropout masks are each target's own."""
        if not (self.training and self.numbers.dropout):
            return torch.nn.functional.linear(input_tI, self.fused_down())
        with self._mask_generator():
            dropout = self.numbers.dropout
            parts = [dropout_linear(input_tI, self.down(name), dropout) for name in self.targets]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _mask_generator(self) -> Any:
        """The random numbers that masks come from: ranks with the same input draw the same mask."""
        is_same_input = self.is_column_parallel and not self._is_sequence_parallel
        if is_same_input or not self._is_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def _exchange(self, low_rank_tR: Tensor) -> Tensor:
        """What travels between ranks, see the module: `[t, R]` to `[T, R]` or back, or summed."""
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
        """The products that add up to the output: one for each run of a projection's rows.

        Where these are many and small, one product with `fused_up`, zeros and all, is faster.
        """
        if len(self.rows.group_rows) == 1:
            return WHOLE
        parts = []
        for number, name in enumerate(self.targets):
            height = self.rows.group_rows[name]
            for group, features in enumerate(self.rows.slices(name)):
                parts.append((features, number, slice(group * height, (group + 1) * height)))
        return tuple(parts) if len(parts) <= _MOST_PARTS else WHOLE

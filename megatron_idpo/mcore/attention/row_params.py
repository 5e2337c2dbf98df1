"""`RowParams`: positions and attention structure of one row, as Megatron's `packed_seq_params`.

Megatron-core passes `packed_seq_params` to every layer of every stage and keeps it per micro-batch,
so it is still the right one under full and selective recomputation. `RowParams` contains what
attention, the rotary embedding and the taps need to know about their row. A row is one micro-batch:
tokens `[1, T]`, hidden `[T, 1, H]`. Rows are built in `data/packing/rows.py`.

Under context parallelism a rank has some of the row's positions: tokens `[1, L]`, hidden
`[L, 1, H]`. `ContextShare` says which; the structure is always the whole row's.

Shape suffixes: `T` positions of the row, `L` of them on this rank, `R` context-parallel
ranks, `G` groups in the row.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

type Group = tuple[int, int, int, int]
"""Bounds `(b0, b1, b2, b3)` of one group, in row positions; see `RowParams`."""


@dataclass(frozen=True, slots=True, eq=False)
class ContextShare:
    """Which positions of a row each context-parallel rank has (`data/packing/dealing.py`)."""

    positions_RL: NDArray[np.int64]
    """On the host: the positions of each rank, ascending."""

    rank: int
    """This rank."""

    order_T: Tensor
    """`positions_RL`, flattened, on the model's device."""

    slots_T: Tensor
    """int64, on the model's device: the inverse, where each position is in `order_T`."""

    @classmethod
    def of(
        cls, positions_RL: NDArray[np.int64], rank: int, device: torch.device | str = "cpu"
    ) -> Self:
        """A share from the positions of each rank.

        Args:
            positions_RL: int64 `[R, L]`: every position of the row once, ascending for each rank.
            rank: this rank.
            device: of the model.
        """
        order_T = torch.from_numpy(positions_RL.ravel())
        return cls(positions_RL, rank, order_T.to(device), order_T.argsort().to(device))

    @property
    def own_L(self) -> NDArray[np.int64]:
        """The positions of this rank, ascending."""
        own_L: NDArray[np.int64] = self.positions_RL[self.rank]
        return own_L


@dataclass(kw_only=True, eq=False)
class RowParams(PackedSeqParams):
    """The structure of one row.

    A *group* is a prompt followed by its two answers. The prompt `[b0, b1)` is causal. The chosen
    answer `[b1, b2)` sees the prompt and itself, causally. The rejected answer `[b2, b3)` sees the
    prompt and itself, but not the chosen answer. A plain sequence is `(b0, e, e, e)`. Groups do not
    see each other. Positions outside all groups are padding; attention outputs 0 there.

    Build it with `of` or `plain`; treat it as immutable.

    Attributes:
        position_ids_T: int64 `[T]`, on the model's device. Consecutive within a group, where both
            answers continue from the prompt; arbitrary in padding.
        spans_G4: int32 `[G, 4]` on the CPU, since both attention backends read it on the host and
            reading from a GPU would synchronize. Groups are disjoint and ascending; G may be 0.
        group_weight: what a group contributes to a mean over the global batch's pairs.
        share: under context parallelism, which positions this rank has; None: all.
        derived: masks that the attention backends compute once per row and read in every layer,
            keyed by backend and window. It lives as long as the row.
    """

    position_ids_T: Tensor
    spans_G4: Tensor
    group_weight: float = 0.0
    share: ContextShare | None = None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Set Megatron's fields for the `sbhd` format and assert that the arrays are consistent."""
        super().__post_init__()
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.position_ids_T.numel()
        self._assert_consistent()
        # Computed now: `CarriedBatch` copies the fields of a row, not its properties.
        _ = self.own_position_ids_L

    @classmethod
    def of(
        cls,
        position_ids_T: Tensor,
        spans_G4: Tensor,
        group_weight: float = 0.0,
        share: ContextShare | None = None,
    ) -> Self:
        """A row from its arrays.

        Args:
            position_ids_T: int64 `[T]` on the device of the model.
            spans_G4: int32 `[G, 4]` on the CPU.
            group_weight: what a group contributes to a mean over the global batch's pairs.
            share: under context parallelism, which positions this rank has.

        Raises:
            AssertionError: If the arrays violate the invariants of the class.
        """
        return cls(
            position_ids_T=position_ids_T, spans_G4=spans_G4, group_weight=group_weight, share=share
        )

    @classmethod
    def plain(cls, num_tokens: int, device: torch.device | str = "cpu") -> Self:
        """One causal sequence that fills the row.

        Args:
            num_tokens: T, at least 1.
            device: Of the model.
        """
        spans_G4 = torch.tensor([[0, num_tokens, num_tokens, num_tokens]], dtype=torch.int32)
        return cls.of(torch.arange(num_tokens, device=device), spans_G4)

    @property
    def row_tokens(self) -> int:
        """T, the positions of the row, including padding."""
        return self.position_ids_T.numel()

    @property
    def own_tokens(self) -> int:
        """L, the positions of the row that this rank has."""
        return self.row_tokens if self.share is None else self.share.positions_RL.shape[1]

    @cached_property
    def own_positions_L(self) -> NDArray[np.int64]:
        """This rank's positions of the row, ascending; int64 on the host."""
        return np.arange(self.row_tokens) if self.share is None else self.share.own_L

    @cached_property
    def own_position_ids_L(self) -> Tensor:
        """Position ids of this rank's positions, int64 `[L]` on the model's device."""
        if self.share is None:
            return self.position_ids_T
        own_L = self.share.order_T.view(self.share.positions_RL.shape)[self.share.rank]
        return self.position_ids_T.index_select(0, own_L)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """`spans_G4` as plain integers."""
        return tuple((b0, b1, b2, b3) for b0, b1, b2, b3 in self.spans_G4.tolist())

    def _assert_consistent(self) -> None:
        position_ids_T, spans_G4 = self.position_ids_T, self.spans_G4
        assert position_ids_T.dim() == 1 and position_ids_T.dtype == torch.int64, (
            f"position ids: {tuple(position_ids_T.shape)} {position_ids_T.dtype}, not int64 [T]"
        )
        assert spans_G4.dim() == 2 and spans_G4.size(1) == 4 and spans_G4.dtype == torch.int32, (
            f"spans: {tuple(spans_G4.shape)} {spans_G4.dtype}, not int32 [G, 4]"
        )
        assert spans_G4.device.type == "cpu", f"spans are on {spans_G4.device}, not on the CPU"
        end = 0
        for group in self.groups:
            assert end <= group[0], f"group {group} starts before {end}, where the last one ended"
            assert list(group) == sorted(group), f"the bounds of group {group} do not ascend"
            end = group[3]
        assert end <= self.row_tokens, f"a group ends at {end} in a row of {self.row_tokens}"
        if position_ids_T.device.type == "cpu":  # on a GPU this would synchronize
            self._assert_positions()

    def _assert_positions(self) -> None:
        for b0, b1, b2, b3 in self.groups:
            if b3 == b0:
                continue
            # From the prompt's first position: chosen runs on to the end of its answer, rejected
            # starts again where the prompt ends.
            chosen = torch.arange(b2 - b0)
            rejected = torch.arange(b1 - b0, b1 - b0 + b3 - b2)
            expected = torch.cat([chosen, rejected]) + self.position_ids_T[b0]
            assert torch.equal(self.position_ids_T[b0:b3], expected), (
                f"the positions of group {(b0, b1, b2, b3)} do not continue from its prompt"
            )

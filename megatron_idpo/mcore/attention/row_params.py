"""The row as Megatron carries it: positions and attention structure of one micro-batch.

Megatron-core hands `packed_seq_params` down to every layer of every stage and closes over it per
micro-batch, so it survives full and selective recompute. `RowParams` is such an object: what
attention, rotary and the taps need to know about the row they are in, and nothing global. A row is
one micro-batch: tokens `[1, T]`, hidden `[T, 1, H]`.

It says nothing about targets or losses, and it does not build rows (`data/rows.py` does).

Shape suffixes: `T` positions of the row, `G` groups in it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

type Group = tuple[int, int, int, int]
"""Bounds `(b0, b1, b2, b3)` of one group, in row positions; see `RowParams.spans_G4`."""


@dataclass(kw_only=True, eq=False)
class RowParams(PackedSeqParams):
    """The structure of one row.

    A *group* is a prompt with its two answers, stored once each, one behind the other. The prompt
    `[b0, b1)` is causal; the chosen answer `[b1, b2)` sees the prompt and itself, causally; the
    rejected answer `[b2, b3)` sees the prompt and itself, never the chosen one. A plain sequence is
    `(b0, e, e, e)`. Groups never see each other. Positions in no group are padding: attention
    gives 0 there.

    Build it with `of` or `plain`; treat it as immutable.

    Attributes:
        position_ids_T: int64 `[T]`, on the model's device. Within a group they are consecutive,
            and both answers continue from the prompt; what padding holds is of no matter.
        spans_G4: int32 `[G, 4]` on the CPU (attention on a CPU slices by them, and reading them
            from a GPU would synchronise). Groups are disjoint and ascending; G may be 0.
        derived: what attention backends build once per row and read in every layer (the block
            mask, one per distinct window), keyed by them. It lives exactly as long as the row.
    """

    position_ids_T: Tensor
    spans_G4: Tensor
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Fills Megatron's fields for the `sbhd` format and asserts that the spans make sense."""
        super().__post_init__()
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.position_ids_T.numel()
        self._assert_sound()

    @classmethod
    def of(cls, position_ids_T: Tensor, spans_G4: Tensor) -> Self:
        """A row from the arrays that `data/rows.py` builds.

        Args:
            position_ids_T: int64 `[T]` on the device of the model.
            spans_G4: int32 `[G, 4]` on the CPU.

        Returns:
            The row.

        Raises:
            AssertionError: If the arrays contradict what the class promises.
        """
        return cls(position_ids_T=position_ids_T, spans_G4=spans_G4)

    @classmethod
    def plain(cls, num_tokens: int, device: torch.device | str = "cpu") -> Self:
        """One ordinary causal sequence that fills the row.

        Args:
            num_tokens: T, at least 1.
            device: Where the model is.

        Returns:
            The row.
        """
        spans_G4 = torch.tensor([[0, num_tokens, num_tokens, num_tokens]], dtype=torch.int32)
        return cls.of(torch.arange(num_tokens, device=device), spans_G4)

    @property
    def row_tokens(self) -> int:
        """T, the positions of the row, padding included."""
        return self.position_ids_T.numel()

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """`spans_G4` as plain integers."""
        return tuple((b0, b1, b2, b3) for b0, b1, b2, b3 in self.spans_G4.tolist())

    def _assert_sound(self) -> None:
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
            assert end <= group[0], f"group {group} starts before {end}, the end of the one before"
            assert list(group) == sorted(group), f"the bounds of group {group} do not ascend"
            end = group[3]
        assert end <= self.row_tokens, f"a group ends at {end} in a row of {self.row_tokens}"
        if position_ids_T.device.type == "cpu":  # on a GPU this would synchronise
            self._assert_positions()

    def _assert_positions(self) -> None:
        for b0, b1, b2, b3 in self.groups:
            prompt_tokens, longer = b1 - b0, max(b2 - b1, b3 - b2)
            if b3 == b0:
                continue
            first = self.position_ids_T[b0]
            expected = torch.arange(prompt_tokens + longer) + first
            answers = (expected[prompt_tokens:][: b2 - b1], expected[prompt_tokens:][: b3 - b2])
            assert torch.equal(
                self.position_ids_T[b0:b3], torch.cat([expected[:prompt_tokens], *answers])
            ), f"the positions of group {(b0, b1, b2, b3)} do not continue from its prompt"

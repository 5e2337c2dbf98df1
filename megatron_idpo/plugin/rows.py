"""Shared-prompt rows as input of a model and as `PreferenceBatch`.

T  row positions   R  context-parallel ranks   L = T / R  positions of this rank
N  targets   P  pairs
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idpo.data.packing.dealing import deal_positions
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.attention.row_params import ContextShare, RowParams
from megatron_idpo.mcore.cpu.redirect import to_device
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.targets import Targets, digest_of


class RowMicroBatch(NamedTuple):
    """A row on the device of the model."""

    batch: PreferenceBatch
    inputs: dict[str, Any]
    """Arguments of the model's call: `dpo.forward(model, batch, **inputs)`."""


def row_micro_batch(
    row: Row, device: torch.device, *, context: tuple[int, int] = (0, 1), **fields: Any
) -> RowMicroBatch:
    """Copy a row, or a context-parallel rank's part of it, to a device.

    To a GPU it is one asynchronous copy out of pinned memory; the caching host allocator keeps that
    memory until the copy has ended.

    Args:
        row: with P pairs, chosen and rejected answers alternating.
        device: of the model.
        context: index of this context-parallel rank, and their number, which divides the row.
        **fields: of `PreferenceBatch`.

    Raises:
        DataError: the fields do not fit the row.
    """
    group_weight = 0.0
    if global_pairs := fields.get("global_pairs"):
        # A pair is one group with a shared prompt, else two.
        group_weight = row.num_pairs / (max(len(row.spans_G4), 1) * global_pairs)
    row_tokens = len(row.tokens_T)
    targets = (row.target_positions_N, row.target_tokens_N, row.target_sequences_N)
    arrays = [row.tokens_T, row.position_ids_T, *targets]
    rank, ranks = context
    if ranks > 1:
        positions_RL = deal_positions(row.spans_G4, row_tokens, ranks)
        order_T, slots_T = positions_RL.ravel(), np.argsort(positions_RL.ravel())
        arrays[0] = row.tokens_T[positions_RL[rank]]
        arrays += [*_own_targets(targets, slots_T, rank, row_tokens // ranks), order_T, slots_T]
    tokens_L, position_ids_T, *tensors = _on_device(arrays, device)
    own, share = None, None
    if ranks > 1:
        own = _as_targets(row, tensors[3:6])
        share = ContextShare(positions_RL, rank, order_T=tensors[6], slots_T=tensors[7])
    # On the host: reading it from a GPU would wait.
    digest = int(digest_of(*(torch.from_numpy(array_N) for array_N in targets)))
    whole = replace(_as_targets(row, tensors[:3]), dealt=own, digest=digest)
    params = RowParams.of(position_ids_T, torch.from_numpy(row.spans_G4), group_weight, share)
    inputs = {
        "input_ids": tokens_L[None],
        "position_ids": params.own_position_ids_L[None],
        # The structure of the row defines the mask.
        "attention_mask": None,
        # The spans stay on the CPU, where kernels' launch arguments and masks are prepared.
        "packed_seq_params": params,
    }
    return RowMicroBatch(PreferenceBatch(whole, **fields), inputs)


def _as_targets(row: Row, tensors: list[Tensor]) -> Targets:
    positions_N, tokens_N, sequences_N = tensors
    shape = (1, len(row.tokens_T))
    return Targets(positions_N, tokens_N, sequences_N, 2 * row.num_pairs, shape)


def _own_targets(
    targets: tuple[NDArray[np.int64], ...], slots_T: NDArray[np.int64], rank: int, own_tokens: int
) -> list[NDArray[np.int64]]:
    """Positions, tokens and sequences of the targets that a rank predicts.

    Chosen here, on the host: on a GPU, selecting by a mask would wait for the device.
    """
    slot_N = slots_T[targets[0]]
    is_own_N = slot_N // own_tokens == rank
    return [array_N[is_own_N] for array_N in (slot_N % own_tokens, *targets[1:])]


def _on_device(arrays: list[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """The arrays on a device, in one copy that the host does not wait for."""
    together = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    return list(together.split([len(array) for array in arrays]))

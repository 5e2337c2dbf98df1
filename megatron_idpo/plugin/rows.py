"""Shared-prompt rows as input of a model and as `PreferenceBatch`.

T  row positions   N  targets   P  pairs
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.cpu.redirect import to_device
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.targets import Targets


class RowMicroBatch(NamedTuple):
    """A row on the device of the model."""

    batch: PreferenceBatch
    inputs: dict[str, Any]
    """Arguments of the model's call: `dpo.forward(model, batch, **inputs)`."""


def row_micro_batch(row: Row, device: torch.device, **fields: Any) -> RowMicroBatch:
    """Copy a row to a device.

    To a GPU it is one asynchronous copy out of pinned memory; the caching host allocator keeps that
    memory until the copy has ended.

    Args:
        row: with P pairs, chosen and rejected answers alternating.
        device: of the model.
        **fields: of `PreferenceBatch`.

    Raises:
        DataError: the fields do not fit the row.
    """
    arrays = (
        row.tokens_T,
        row.position_ids_T,
        row.target_positions_N,
        row.target_tokens_N,
        row.target_sequences_N,
    )
    together = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    sizes = [len(array) for array in arrays]
    tokens_T, position_ids_T, positions_N, targets_N, sequences_N = together.split(sizes)
    targets = Targets(
        positions_N, targets_N, sequences_N, 2 * row.num_pairs, shape=(1, len(row.tokens_T))
    )
    group_weight = 0.0
    if global_pairs := fields.get("global_pairs"):
        # A pair is one group with a shared prompt, else two.
        group_weight = row.num_pairs / (max(len(row.spans_G4), 1) * global_pairs)
    inputs = {
        "input_ids": tokens_T[None],
        "position_ids": position_ids_T[None],
        # The structure of the row defines the mask.
        "attention_mask": None,
        # The spans stay on the CPU, where kernels' launch arguments and masks are prepared.
        "packed_seq_params": RowParams.of(
            position_ids_T, torch.from_numpy(row.spans_G4), group_weight
        ),
    }
    return RowMicroBatch(PreferenceBatch(targets, **fields), inputs)

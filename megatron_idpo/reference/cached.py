"""The reference as a table: a look-up in place of a forward pass.

Shapes: P pairs of a row, B pairs of this rank's rows, L layers, 2 = chosen, rejected.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.plugin.batch_run import ReferenceLogps
from megatron_idpo.reference.cache import CachedLogps


class Cached:
    """A `Reference` (`live.py`) that was computed before."""

    is_free = False
    is_live = False

    def __init__(self, table: CachedLogps) -> None:
        """Take the log-probabilities of the very pairs whose rows will be asked for."""
        self._table = table

    @property
    def logps_PL2(self) -> NDArray[np.float32]:
        """Of every pair at every layer of the table, float32 [P, L, 2]."""
        return self._table.logps_PL2

    @property
    def final_logps_P2(self) -> NDArray[np.float32]:
        """Of every pair at the final layer, float32 [P, 2]."""
        return self._table.logps_PL2[:, -1]

    def logps(self, batch: Batch) -> ReferenceLogps:
        """Those of this rank's rows, at every layer, on whatever stage. Not collective.

        One copy to the device for the whole batch.
        """
        rows = [row.pair_index_P for row in batch.rows]
        found_BL2 = self._table.logps_PL2[np.concatenate(rows)]
        found_LB2 = torch.from_numpy(np.ascontiguousarray(found_BL2.transpose(1, 0, 2)))
        device = default_device()
        if device.type == "cuda":
            found_LB2 = found_LB2.pin_memory()
        flat_L2B = found_LB2.flatten(1).to(device, non_blocking=True)
        by_row = flat_L2B.split([2 * len(row) for row in rows], dim=1)
        return [dict(zip(self._table.layers, logps.unbind(0), strict=True)) for logps in by_row]

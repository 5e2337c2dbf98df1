"""Score pairs: reference log-probabilities by forward passes in the run's layout.

In bf16 a log-probability depends on the row that a pair is in: on its length, and on where the pair
begins. Training pairs are therefore scored in the batches of the first epoch and held-out pairs in
those of an evaluation, so that a run in the same layout reads them from equal rows.

Every rank runs its rows of a batch; one all-reduce of a float32 table combines the values of all
stages and data-parallel ranks. It carries two more values: whether a rank received a stop signal,
and whether a part is due. All ranks therefore stop, and write, after the same batch.

Batches begin at multiples of their size, also after a restart, so that scoring that is killed and
resumed in the same layout ends with the same bits.

Shapes: B pairs of a batch, P of a row, L layers, 2 = chosen, rejected, 3 = and a count.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_idpo.console.progress import show_progress
from megatron_idpo.data.packing.batches import Batch, EvaluationBatches, RowSettings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import DataError
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.pipeline import is_last_stage
from megatron_idpo.mcore.parallel.world import (
    StopFlag,
    broadcast_from_rank0,
    is_rank0,
    raise_on_all_ranks,
)
from megatron_idpo.mcore.watchdog.activity import doing
from megatron_idpo.reference.cache import CacheWriter
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.logps_table import Logps
from megatron_idpo.reference.sources import Reference

PAIRS_PER_RANK = 32
"""In a batch, per data-parallel rank: enough for several evenly filled rows and a busy pipeline,
few enough to stop soon after a signal."""

PART_INTERVAL_S = 30.0
"""Seconds of scoring that a kill may cost."""


@dataclass(frozen=True, slots=True)
class CachePart:
    """The cache of one set of pairs."""

    pairs: PairDataset
    directory: Path
    fingerprint: Fingerprint
    unit: str
    """Of the progress: `training pairs`."""

    description: str = "reference log-probs"
    """Of the progress."""

    order_P: NDArray[np.int64] | None = None
    """The pairs in the order in which they will be read; None is that of `pairs`."""

    batch_pairs: int | None = None
    """Pairs of the batches in which they will be read; None is `PAIRS_PER_RANK` of each rank."""

    def batches(self, rows: RowSettings, first: int = 0) -> Iterable[Batch]:
        """The batches to score, from a position in the order; `Row.pair_index_P` counts from it.

        Raises:
            DataError: a pair is longer than a row.
        """
        if first >= len(self.pairs):
            return ()
        order_P = np.arange(len(self.pairs)) if self.order_P is None else self.order_P
        size = self.batch_pairs or PAIRS_PER_RANK * rows.data_size
        return EvaluationBatches(self.pairs.select(order_P[first:]), rows, global_batch_pairs=size)

    def location(self, position: int) -> str:
        """File and line of the pair at a position in the order."""
        index = position if self.order_P is None else int(self.order_P[position])
        return self.pairs.location(index)


def score_pairs(source: Reference, part: CachePart, rows: RowSettings, stop_flag: StopFlag) -> bool:
    """Compute a cache, or the rest of it. Collective; the first rank holds the cache's lock.

    Args:
        source: a live reference with the fingerprint's layers.
        part: the pairs and their cache.
        rows: how pairs are packed.
        stop_flag: whether this process has received a stop signal.

    Returns:
        Whether it is complete; otherwise a rank received a signal, and all scored pairs are saved.

    Raises:
        UserError: on every rank. The directory has the cache of other inputs or cannot be written;
            a log-probability is NaN or infinite.
    """
    writer = None
    with raise_on_all_ranks("opening the reference cache"):
        if is_rank0():
            writer = CacheWriter(part.directory, part.fingerprint, part.order_P)
    layers = part.fingerprint.layers
    first = broadcast_from_rank0(lambda: writer.done_pairs if writer else 0)
    with raise_on_all_ranks("packing the data"):
        remaining = part.batches(rows, first)
    last_part_s, is_stopping = time.monotonic(), False
    with show_progress(
        part.description, len(part.pairs), unit=part.unit, completed=first, show=is_rank0()
    ) as progress:
        for batch in remaining:
            is_due = time.monotonic() - last_part_s >= PART_INTERVAL_S
            flags = (float(stop_flag.stop_requested), float(is_due))
            with doing(part.description, is_timed=True):
                logps_BL2, any_stop, is_due = _score_batch(source, batch, layers, flags)
            _check_finite(logps_BL2, layers, part, progress.completed)
            progress.advance(batch.num_pairs)
            # A signal during the last batch needs no stop: scoring is complete.
            is_stopping = any_stop and progress.completed < len(part.pairs)
            if writer:
                writer.add(logps_BL2)
            if is_due or is_stopping:
                last_part_s = time.monotonic()
                with raise_on_all_ranks("writing the reference cache"):
                    if writer:
                        writer.write_part()
            if is_stopping:
                return False
    with raise_on_all_ranks("finishing the reference cache"):
        if writer:
            writer.finish()
    return True


def _score_batch(
    source: Reference, batch: Batch, layers: tuple[int, ...], flags: tuple[float, float]
) -> tuple[Logps, bool, bool]:
    """The whole batch's log-probabilities [B, L, 2]; whether any rank stops; whether rank 0 writes.

    Collective: the forward pass, and one all-reduce over the world.
    """
    by_row = source.logps(batch)
    assert by_row is not None, "a live reference has log-probabilities"
    # Values and counts of the pairs, then the two flags, in one all-reduce.
    reduced = torch.zeros(batch.num_pairs * len(layers) * 3 + 2, device=default_device())
    # Tensor- and context-parallel ranks have the same values: only one of them may enter the sum.
    if rank_coordinates().counts_rows:
        first = batch.consumed_pairs - batch.num_pairs
        table_BL3 = reduced[:-2].view(batch.num_pairs, len(layers), 3)
        for row, logps in zip(batch.rows, by_row, strict=True):
            at_P = torch.from_numpy(row.pair_index_P - first).to(reduced.device)
            for layer, logps_2P in logps.items():
                # With `reference_layer: final` other stages have a copy of the final layer, which
                # must not enter the sum again.
                if layer != layers[-1] or is_last_stage():
                    table_BL3[at_P, layers.index(layer), :2] = logps_2P.view(-1, 2)
                    table_BL3[at_P, layers.index(layer), 2] = 1.0
    reduced[-2] = flags[0]
    reduced[-1] = flags[1] if is_rank0() else 0.0
    dist.all_reduce(reduced)
    values = reduced.cpu().numpy()
    sums_BL3 = values[:-2].reshape(batch.num_pairs, len(layers), 3)
    # The sum is right only if exactly one rank contributed to each pair and layer.
    assert (sums_BL3[..., 2] == 1.0).all(), "each pair and layer comes from one rank"
    return sums_BL3[..., :2], bool(values[-2] > 0), bool(values[-1] > 0)


def _check_finite(logps_BL2: Logps, layers: tuple[int, ...], part: CachePart, first: int) -> None:
    """Check that the reference has a finite value for every pair; the same on every rank."""
    invalid = np.argwhere(~np.isfinite(logps_BL2))
    if len(invalid):
        pair, layer, answer = invalid[0]
        message = (
            f"the reference gives its {('chosen', 'rejected')[answer]} answer the "
            f"log-probability {logps_BL2[pair, layer, answer]} at layer {layers[layer]}"
        )
        remedy = "compute in fp32 (model.dtype), or check the pair and the model"
        raise DataError.at(part.location(first + int(pair)), message, remedy)

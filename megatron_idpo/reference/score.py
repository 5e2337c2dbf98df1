"""Reference log-probabilities of all pairs: forward passes in the run's layout, in data order.

Every rank runs its rows of a batch; one all-reduce of a float32 table puts together what the stages
and the data-parallel ranks know, with two numbers more: whether somebody is asked to stop, and
whether a part is due. So all ranks stop, and write, after the same batch.

Batches begin at multiples of their size, also after a restart, so that a scoring that was killed
and goes on in the same layout ends with the same bits.

Shapes: B pairs of a batch, P of a row, L layers, 2 = chosen, rejected, 3 = and how often told.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_idpo.data.packing.batches import Batch, EvaluationBatches, RowSettings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import DataError
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import is_last_stage, this_rank
from megatron_idpo.mcore.parallel.signals import StopFlag
from megatron_idpo.mcore.parallel.world import from_first, is_first_rank, raise_on_all_ranks
from megatron_idpo.reference.cache import CacheWriter
from megatron_idpo.reference.cache_files import Logps
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.live import Reference
from megatron_idpo.reference.score_progress import ScoreProgress

PAIRS_PER_RANK = 32
"""In a batch, per data-parallel rank: several rows, so that they fill evenly and a pipeline is
busy, and few enough that a stop is heeded soon."""

PART_S = 30.0
"""Seconds of scoring that a kill may cost."""


def score_pairs(
    source: Reference,
    pairs: PairDataset,
    rows: RowSettings,
    *,
    directory: Path,
    fingerprint: Fingerprint,
    stop_flag: StopFlag,
    what: str = "pairs",
    part_s: float = PART_S,
) -> bool:
    """Make a cache, or go on making it. Collective; the first rank holds the directory.

    Args:
        source: a live reference, read at the fingerprint's layers.
        pairs: all that are to be scored.
        rows: how they are laid out.
        directory: of the cache.
        fingerprint: of the cache.
        stop_flag: whether this process has been asked to stop.
        what: to call them.
        part_s: seconds after which a part is written.

    Returns:
        Whether it is complete; otherwise somebody was asked to stop, and what was scored is saved.

    Raises:
        UserError: on every rank. The directory has something else or cannot be written; a
            log-probability is NaN or infinite.
    """
    writer = None
    with raise_on_all_ranks("opening the reference cache"):
        if is_first_rank():
            writer = CacheWriter(directory, fingerprint)
    layers = fingerprint.layers
    done = first = from_first(lambda: writer.done_pairs if writer else 0)
    marked_s, is_stopping = time.monotonic(), False
    with ScoreProgress(what, len(pairs), done=done, show=is_first_rank()) as progress:
        for batch in _rest(pairs, first, rows):
            mine = (float(stop_flag.is_there), float(time.monotonic() - marked_s >= part_s))
            logps_BL2, stops, is_due = _read(source, batch, layers, mine)
            _check_finite(logps_BL2, layers, pairs, done)
            done += batch.num_pairs
            progress.update(done)
            is_stopping = stops and done < len(pairs)
            if writer:
                writer.add(logps_BL2)
            if is_due or is_stopping:
                marked_s = time.monotonic()
                with raise_on_all_ranks("writing the reference cache"):
                    if writer:
                        writer.write_part()
            if is_stopping:
                return False
    with raise_on_all_ranks("finishing the reference cache"):
        if writer:
            writer.finish()
    return True


def _rest(pairs: PairDataset, first: int, rows: RowSettings) -> EvaluationBatches | tuple[()]:
    """Batches of the pairs from `first` on; they count from there."""
    if first == len(pairs):
        return ()
    with raise_on_all_ranks("laying out the data"):
        rest = pairs.select(np.arange(first, len(pairs)))
        return EvaluationBatches(rest, rows, global_batch_pairs=PAIRS_PER_RANK * rows.data_size)


def _read(
    source: Reference, batch: Batch, layers: tuple[int, ...], mine: tuple[float, float]
) -> tuple[Logps, bool, bool]:
    """The whole batch's log-probabilities [B, L, 2]; whether any rank stops, or the first writes.

    Collective: the forward pass, and one all-reduce over the world.
    """
    by_row = source.logps(batch)
    assert by_row is not None, "a live reference has log-probabilities"
    message = torch.zeros(batch.num_pairs * len(layers) * 3 + 2, device=default_device())
    if this_rank().tensor == 0:
        first = batch.consumed_pairs - batch.num_pairs
        table_BL3 = message[:-2].view(batch.num_pairs, len(layers), 3)
        for row, found in zip(batch.rows, by_row, strict=True):
            at_P = torch.from_numpy(row.pair_index_P - first).to(message.device)
            for layer, logps_2P in found.items():
                # Other stages may have been told of the final layer (`reference_layer: final`).
                if layer != layers[-1] or is_last_stage():
                    table_BL3[at_P, layers.index(layer), :2] = logps_2P.view(-1, 2)
                    table_BL3[at_P, layers.index(layer), 2] = 1.0
    message[-2] = mine[0]
    message[-1] = mine[1] if is_first_rank() else 0.0
    dist.all_reduce(message)
    values = message.cpu().numpy()
    heard_BL3 = values[:-2].reshape(batch.num_pairs, len(layers), 3)
    assert (heard_BL3[..., 2] == 1.0).all(), "each pair and layer is told by one rank"
    return heard_BL3[..., :2], bool(values[-2] > 0), bool(values[-1] > 0)


def _check_finite(
    logps_BL2: Logps, layers: tuple[int, ...], pairs: PairDataset, first: int
) -> None:
    """Refuse a reference that says nothing of a pair; the same on every rank."""
    wrong = np.argwhere(~np.isfinite(logps_BL2))
    if len(wrong):
        pair, layer, answer = wrong[0]
        message = (
            f"the model that is read gives its {('chosen', 'rejected')[answer]} answer the "
            f"log-probability {logps_BL2[pair, layer, answer]} at layer {layers[layer]}"
        )
        remedy = "compute in fp32 (model.dtype), or look at the pair and the model"
        raise DataError.at(pairs.location(first + int(pair)), message, remedy)

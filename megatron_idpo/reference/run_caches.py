"""The reference caches of a run: of its training pairs, and of its held-out pairs if any."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import StopFlag, is_rank0, raise_on_all_ranks, read_on_rank0
from megatron_idpo.reference.cache import EVAL, CacheWriter, is_complete, lock_cache, open_cache
from megatron_idpo.reference.fingerprint import fingerprint
from megatron_idpo.reference.score import CachePart, score_pairs
from megatron_idpo.reference.sources import CachedReference, Reference


@dataclass(frozen=True, slots=True)
class RunCaches:
    """The caches of one model in one directory."""

    directory: Path
    model: FrozenModel
    """The reference."""

    parts: tuple[CachePart, ...]
    """Of the training pairs, then of the held-out pairs if there are any."""

    @classmethod
    def of(cls, config: RunConfig, pairs: RunPairs, model: FrozenModel) -> Self:
        """The caches that a configuration names.

        Args:
            config: of the run.
            pairs: of the run.
            model: the reference.

        Raises:
            ConfigError: the model does not have one of the layers, or no directory is configured.
        """
        directory = cache_directory(config)
        num_pairs = len(pairs.train)
        order_P = stream_pairs(0, num_pairs, num_pairs=num_pairs, seed=config.data.seed)
        sets: list[tuple[str, Path, PairDataset, NDArray[np.int64] | None]]
        sets = [("training pairs", directory, pairs.train, order_P)]
        if pairs.eval is not None:
            sets.append(("held-out pairs", directory / EVAL, pairs.eval, None))
        batch_pairs = config.training.global_batch_pairs if config.has("training") else None
        num_layers = model.source.architecture.num_layers
        parts = []
        for unit, location, dataset, order in sets:
            required = fingerprint(
                config, dataset, pairs.tokenizer, weights=model.identity, num_layers=num_layers
            )
            parts.append(
                CachePart(dataset, location, required, unit, order_P=order, batch_pairs=batch_pairs)
            )
        return cls(directory, model, tuple(parts))

    def are_complete(self) -> bool:
        """Whether there is nothing to score. Collective.

        Raises:
            CheckpointError: on every rank; an existing cache was made from other inputs, or is
                damaged.
        """
        # A list, not a generator: every rank must take part in every check.
        return all([_is_complete(part) for part in self.parts])

    def score(self, source: Reference, rows: RowSettings, stop_flag: StopFlag) -> bool:
        """Compute what is missing. Collective.

        Args:
            source: a live reference with the layers of the fingerprint.
            rows: how pairs are packed.
            stop_flag: whether this process has received a stop signal.

        Returns:
            Whether all is complete; otherwise a signal ended it, and all scored pairs are saved.

        Raises:
            UserError: on every rank.
        """
        with ExitStack() as stack:
            with raise_on_all_ranks("locking the reference cache"):
                if is_rank0():
                    stack.enter_context(lock_cache(self.directory))
            for part in self.parts:
                if _is_complete(part):
                    continue
                if not score_pairs(source, part, rows, stop_flag):
                    return False
        return True

    def copy_from(self, other: "RunCaches", indices_K: NDArray[np.int64]) -> None:
        """Fill incomplete caches from complete ones of the same model. Collective.

        Args:
            other: has at least these layers and training pairs, and the same held-out pairs.
            indices_K: the indices of these training pairs in `other`, int [K].

        Raises:
            CheckpointError: on every rank; a cache is damaged, was made from other inputs, or
                cannot be written.
        """
        with raise_on_all_ranks("copying the reference cache"):
            if not is_rank0():
                return
            with lock_cache(self.directory):
                selections = (indices_K, slice(None))  # training pairs, held-out pairs
                for own, theirs, selected in zip(
                    self.parts, other.parts, selections[: len(self.parts)], strict=True
                ):
                    if is_complete(own.directory, own.fingerprint):
                        continue
                    assert own.fingerprint.weights == theirs.fingerprint.weights
                    required = replace(theirs.fingerprint, layers=own.fingerprint.layers)
                    logps_PL2 = open_cache(theirs.directory, required)[selected]
                    writer = CacheWriter(own.directory, own.fingerprint, own.order_P)
                    if own.order_P is not None:
                        logps_PL2 = logps_PL2[own.order_P]
                    writer.add(logps_PL2[writer.done_pairs :])
                    writer.finish()

    def open(self) -> list[CachedReference]:
        """The complete caches as references, in the order of `parts`. Collective.

        Raises:
            CheckpointError: on every rank; one is damaged.
        """
        tables = read_on_rank0(
            "reading the reference cache",
            lambda: [open_cache(part.directory, part.fingerprint) for part in self.parts],
        )
        return [
            CachedReference(part.fingerprint.layers, logps_PL2)
            for part, logps_PL2 in zip(self.parts, tables, strict=True)
        ]


def _is_complete(part: CachePart) -> bool:
    """Whether a cache is complete. Collective.

    Only rank 0, which writes caches, looks: a machine remembers for half a minute or more that a
    file is not on NFS, also when another one has written it meanwhile.

    Raises:
        CheckpointError: on every rank; it was made from other inputs, or is damaged.
    """
    return read_on_rank0(
        "checking the reference cache", lambda: is_complete(part.directory, part.fingerprint)
    )


def cache_directory(config: RunConfig) -> Path:
    """`reference.cache`, or `reference` in the run's output.

    Raises:
        ConfigError: there is neither.
    """
    if config.reference.cache is not None:
        return Path(config.reference.cache).expanduser()
    if not config.has("training"):
        remedy = "name a directory, or add training.output, in which it is `reference`"
        raise ConfigError.at("reference.cache", "no directory is configured", remedy)
    return Path(config.training.output).expanduser() / "reference"

"""The caches of a run: its training pairs' and, where some are held out, theirs beside it."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.mcore.parallel.signals import StopFlag
from megatron_idpo.mcore.parallel.world import gathered, is_first_rank, raise_on_all_ranks
from megatron_idpo.reference.cache import EVAL, CacheWriter, held, is_complete, open_cache
from megatron_idpo.reference.cached import Cached
from megatron_idpo.reference.fingerprint import Fingerprint, fingerprint
from megatron_idpo.reference.live import Reference
from megatron_idpo.reference.score import PART_S, score_pairs


@dataclass(frozen=True, slots=True)
class _Part:
    """One cache, and the pairs that it is of."""

    what: str
    directory: Path
    pairs: PairDataset
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class RunCaches:
    """Where a run's reference log-probabilities are, and what they have to be."""

    directory: Path
    model: FrozenModel
    """The reference."""

    parts: tuple[_Part, ...]
    """The training pairs', then the held-out ones' if there are any."""

    @classmethod
    def of(cls, config: RunConfig, pairs: RunPairs, model: FrozenModel) -> Self:
        """Those that a configuration names.

        Args:
            config: of the run.
            pairs: of the run.
            model: the reference.

        Raises:
            ConfigError: layers that the model has not, or no place for a cache.
        """
        directory = cache_directory(config)
        named = [("training pairs", directory, pairs.train)]
        if pairs.eval is not None:
            named.append(("held-out pairs", directory / EVAL, pairs.eval))
        parts = [
            _Part(
                what,
                location,
                dataset,
                fingerprint(
                    config,
                    dataset,
                    pairs.tokenizer,
                    weights=model.identity,
                    num_layers=model.source.architecture.num_layers,
                ),
            )
            for what, location, dataset in named
        ]
        return cls(directory, model, tuple(parts))

    @classmethod
    def of_one_set(
        cls,
        model: FrozenModel,
        pairs: PairDataset,
        directory: Path,
        fingerprint: Fingerprint,
        *,
        what: str,
    ) -> Self:
        """The cache of one set of pairs alone, wherever it is kept.

        Args:
            model: whose log-probabilities they are.
            pairs: the set.
            directory: of the cache.
            fingerprint: of the cache.
            what: to call the pairs while scoring.
        """
        return cls(directory, model, (_Part(what, directory, pairs, fingerprint),))

    def are_complete(self) -> bool:
        """Whether there is nothing to score. Collective.

        Raises:
            CheckpointError: on every rank; what is there is of something else, or damaged.
        """
        return all([_is_complete_everywhere(part) for part in self.parts])

    def score(
        self, source: Reference, rows: RowSettings, stop_flag: StopFlag, *, part_s: float = PART_S
    ) -> bool:
        """Compute what is missing. Collective.

        Args:
            source: a live reference, read at the layers of the fingerprint.
            rows: how pairs are laid out.
            stop_flag: whether this process has been asked to stop.
            part_s: seconds after which a part is written.

        Returns:
            Whether all is complete; otherwise a signal ended it, saved.

        Raises:
            UserError: on every rank.
        """
        with ExitStack() as stack:
            with raise_on_all_ranks("holding the reference cache"):
                if is_first_rank():
                    stack.enter_context(held(self.directory))
            for part in self.parts:
                if not _is_complete_everywhere(part) and not score_pairs(
                    source,
                    part.pairs,
                    rows,
                    directory=part.directory,
                    fingerprint=part.fingerprint,
                    stop_flag=stop_flag,
                    what=part.what,
                    part_s=part_s,
                ):
                    return False
        return True

    def take_from(self, other: "RunCaches", indices_K: NDArray[np.int64]) -> None:
        """Fill what is missing from finished caches of the same model. Collective.

        Args:
            other: with every layer of these; its training pairs are more, its held-out ones the
                same.
            indices_K: which of its training pairs these are, int [K].

        Raises:
            CheckpointError: on every rank; a cache is damaged, is another model's, or cannot be
                written.
        """
        with raise_on_all_ranks("taking over the reference cache"):
            if is_first_rank():
                with held(self.directory):
                    for number, (mine, theirs) in enumerate(
                        zip(self.parts, other.parts, strict=True)
                    ):
                        if is_complete(mine.directory, mine.fingerprint):
                            continue
                        assert mine.fingerprint.weights == theirs.fingerprint.weights
                        wanted = replace(theirs.fingerprint, layers=mine.fingerprint.layers)
                        logps_PL2 = open_cache(theirs.directory, wanted).logps_PL2
                        writer = CacheWriter(mine.directory, mine.fingerprint)
                        chosen_PL2 = logps_PL2[indices_K] if number == 0 else logps_PL2
                        writer.add(chosen_PL2[writer.done_pairs :])
                        writer.finish()

    def open(self) -> list[Cached]:
        """The finished caches as references, in the order of `parts`. Collective.

        Raises:
            CheckpointError: on every rank; one is damaged.
        """
        with raise_on_all_ranks("reading the reference cache"):
            return [Cached(open_cache(part.directory, part.fingerprint)) for part in self.parts]


def _is_complete_everywhere(part: _Part) -> bool:
    """Whether a cache is finished. Collective: every rank looks for itself, and all see the same.

    Raises:
        CheckpointError: on every rank; it is of something else, damaged, or not seen by all.
    """
    with raise_on_all_ranks("looking at the reference cache"):
        seen = is_complete(part.directory, part.fingerprint)
    everywhere = gathered(seen)
    if len(set(everywhere)) > 1:
        message = f"is finished as {sum(everywhere)} of {len(everywhere)} ranks see it"
        remedy = "name a directory that all machines share; if they do, start again"
        raise CheckpointError.at(str(part.directory), message, remedy)
    return seen


def cache_directory(config: RunConfig) -> Path:
    """`reference.cache`, or `reference` in the run's output.

    Raises:
        ConfigError: there is neither.
    """
    if config.reference.cache is not None:
        return Path(config.reference.cache).expanduser()
    if not config.has("training"):
        remedy = "name a directory, or add training.output, in which it is `reference`"
        raise ConfigError.at("reference.cache", "says no place for the cache", remedy)
    return Path(config.training.output).expanduser() / "reference"

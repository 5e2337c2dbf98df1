"""What the first model makes of all pairs, and which pairs each step gets after that.

The first model is scored once, on the training pairs and the held-out ones, at every layer that any
step reads: to line pairs up, to know its own accuracy on each source, to compare every step's
result with it, and as the first step's reference. The scores are an ordinary reference cache,
`OUTPUT/first_model`; which pair went where is left in `OUTPUT/curriculum.parquet`.

Shapes: P pairs, R lines of the table, 2 = chosen, rejected.
"""

import gc
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.data.run_pairs import RunPairs, row_settings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.signals import StopFlag, Stopped
from megatron_idpo.mcore.parallel.world import World, raise_on_all_ranks, running
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.frozen import frozen_model
from megatron_idpo.reference.live import Resident
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.sdpo.deal import Easiness, Indices, deal

FIRST_MODEL = "first_model"
TABLE = "curriculum.parquet"


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Which pairs each step gets."""

    slices: Sequence[Indices]
    """Of every step: int64 indices of training pairs, ascending."""

    sources: Sequence[str]
    """Names of the sources."""

    source_P: Indices
    """Which of them each pair comes from."""

    easiness: Easiness
    """Of every pair for the first model."""

    def accuracy(self) -> dict[str, float]:
        """The first model's on each source that has pairs."""
        means = self.easiness.by_source(self.source_P, len(self.sources), "accuracy")
        return {name: mean for name, mean in zip(self.sources, means, strict=True) if mean == mean}

    def source_counts(self, number: int) -> dict[str, int]:
        """How many pairs a step has from each source; steps are counted from 1."""
        counted = Counter(self.source_P[self.slices[number - 1]].tolist())
        return {self.sources[source]: count for source, count in sorted(counted.items())}


def score_first_model(
    config: RunConfig, world: World, model: FrozenModel, pairs: RunPairs, stop_flag: StopFlag
) -> RunCaches:
    """The first model's log-probabilities of all pairs, computed where they are not there yet.

    Collective; no layout runs yet.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came. What was scored is saved.
    """
    scored = scoring_config(config, model.source.architecture.num_layers)
    with raise_on_all_ranks("finding the first model's scores"):
        caches = RunCaches.of(scored, pairs, model)
    with first_models_remedies():
        if caches.are_complete():
            return caches
    with first_models_remedies(), running(config.layout.layout()):
        is_complete = _score(scored, world, model, caches, stop_flag)
        gc.collect()  # models hold themselves in circles, and step 1 needs the memory
    if not is_complete:
        raise Stopped
    return caches


def _score(
    config: RunConfig, world: World, model: FrozenModel, caches: RunCaches, stop_flag: StopFlag
) -> bool:
    """Load the first model and score all pairs; whether that came to its end."""
    chunks, dpo = frozen_model(config, model, show_progress=world.is_first)
    rows = row_settings(config, world.size, data_rank=this_rank().data)
    return caches.score(Resident(dpo, chunks), rows, stop_flag)


@contextmanager
def first_models_remedies() -> Iterator[None]:
    """What is told of the first model's cache leaves `reference.cache` out: it does not move it.

    Raises:
        CheckpointError: the block's, with remedies that work here.
    """
    try:
        yield
    except CheckpointError as error:
        if not error.problems:  # another rank's, told in words
            raise
        mended = [replace(one, remedy=_without_moving(one.remedy)) for one in error.problems]
        raise CheckpointError.of(mended) from None


def _without_moving(remedy: str) -> str:
    """A remedy without those of its choices that name `reference.cache`."""
    if "reference.cache" not in remedy:
        return remedy
    left = [choice for choice in remedy.split(", or ") if "reference.cache" not in choice]
    return ", or ".join(left) or "name another training.output"


def deal_pairs(config: RunConfig, caches: RunCaches, pairs: PairDataset) -> Curriculum:
    """Deal the training pairs to the steps. Collective.

    Raises:
        UserError: on every rank; a cache is damaged, or a step gets no pair.
    """
    assert config.sdpo is not None
    scores = caches.open()[0]
    with raise_on_all_ranks("dealing pairs to the steps"):
        lengths_P2 = pairs.lengths_P3[:, 1:] if config.sdpo.length_normalised else None
        easiness = Easiness.of(scores.final_logps_P2, lengths_P2)
        sources, source_P = _labels(pairs.source_names), pairs.source_P
        slices = deal(config.sdpo, source_P, len(sources), easiness, seed=config.data.seed)
        return Curriculum(slices, sources, source_P, easiness)


def write_curriculum(curriculum: Curriculum, path: Path) -> None:
    """One line per training pair and step: its source, and what the first model says of it.

    A pair of no step has one line, with step 0. On one rank.

    Raises:
        CheckpointError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pair_R, step_R = _pairs_and_steps(curriculum)
    table = pa.table(
        {
            "pair": pair_R,
            "source": [curriculum.sources[source] for source in curriculum.source_P[pair_R]],
            "step": step_R,
            "first_model_margin": curriculum.easiness.margin_P[pair_R],
            "first_model_accuracy": curriculum.easiness.accuracy_P[pair_R],
        }
    )
    fresh = path.with_name(f".{path.name}.incomplete")
    try:
        pq.write_table(table, fresh, compression="zstd")
        os.replace(fresh, path)
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise CheckpointError.at(str(path), message, "free some space") from None


def _pairs_and_steps(curriculum: Curriculum) -> tuple[Indices, NDArray[np.int32]]:
    """Every pair with each of its steps, or with 0; in the order of pairs, then of steps."""
    every_P = np.arange(len(curriculum.source_P))
    dealt = [np.setdiff1d(every_P, np.concatenate(curriculum.slices)), *curriculum.slices]
    pair_R = np.concatenate(dealt)
    step_R = np.repeat(np.arange(len(dealt), dtype=np.int32), [len(pairs) for pairs in dealt])
    order_R = np.lexsort((step_R, pair_R))
    return pair_R[order_R], step_R[order_R]


def step_layers(config: RunConfig, number: int, num_layers: int) -> tuple[int, ...]:
    """The intermediate layers of a step, by number.

    Raises:
        ConfigError: layers that the model has not.
    """
    return resolve_layers(step_config(config, number).objective.layers, num_layers)


def scoring_config(config: RunConfig, num_layers: int) -> RunConfig:
    """A run's that reads every layer of any step, with the cache in the run's own directory.

    Raises:
        ConfigError: a step's layers that the model has not.
    """
    assert config.sdpo is not None
    numbers = range(1, len(config.sdpo.steps) + 1)
    layers = {layer for number in numbers for layer in step_layers(config, number, num_layers)}
    objective = config.objective.model_copy(
        update={"layers": tuple(sorted(layers)), "layer_weights": None}
    )
    cache = str(Path(config.training.output).expanduser() / FIRST_MODEL)
    reference = config.reference.model_copy(update={"source": "cache", "cache": cache})
    return config.model_copy(update={"objective": objective, "reference": reference, "sdpo": None})


def _labels(names: Sequence[str]) -> list[str]:
    """Names of sources, told apart where one path is given twice."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels

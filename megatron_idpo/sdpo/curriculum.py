"""Scores of the first model, and the assignment of pairs to steps that is based on them.

The first model is scored once, on the training and the held-out pairs, at every layer that any step
uses. The scores order the pairs, give the first model's accuracy on each source, are what every
step's result is compared to, and serve as the first step's reference. They are an ordinary
reference cache, `OUTPUT/first_model`. The assignment is in `OUTPUT/curriculum.parquet`.

Shapes: P pairs, R rows of the table, 2 = chosen, rejected.
"""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.hf_io.hub import fetch_models
from megatron_idpo.convert.model_source import FrozenModel, open_model
from megatron_idpo.data.run_pairs import RunPairs, row_settings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    RunStopped,
    StopFlag,
    World,
    distributed_world,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.reference.score_command import score
from megatron_idpo.reference.sources import Resident, frozen_model
from megatron_idpo.sdpo.split import Easiness, Indices, split_pairs
from megatron_idpo.storage.atomic import atomic_file

FIRST_MODEL = "first_model"
TABLE = "curriculum.parquet"


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The pairs of each step."""

    slices: Sequence[Indices]
    """Of every step: int64 indices of training pairs, ascending."""

    sources: Sequence[str]
    """Names of the sources."""

    source_P: Indices
    """Index of each pair's source."""

    easiness: Easiness
    """Of every pair for the first model."""

    def accuracy(self) -> dict[str, float]:
        """Accuracy of the first model on each source that has pairs."""
        means = self.easiness.by_source(self.source_P, len(self.sources), "accuracy")
        return {name: mean for name, mean in zip(self.sources, means, strict=True) if mean == mean}

    def source_counts(self, number: int) -> dict[str, int]:
        """Number of pairs from each source in a step; steps are counted from 1."""
        counts = Counter(self.source_P[self.slices[number - 1]].tolist())
        return {self.sources[source]: count for source, count in sorted(counts.items())}


def score_for_steps(config: RunConfig) -> int:
    """Compute the missing part of `OUTPUT/first_model` ahead of training.

    Returns:
        0 if it is complete; `EXIT_PREEMPTED` if a signal stopped it, after saving.

    Raises:
        UserError: on every rank; parts that were written before still exist.
    """
    with distributed_world(config), remedies_without_cache():
        (model_path,) = fetch_models([config.model.path])
        with raise_on_all_ranks("opening the model"):
            num_layers = open_model(model_path).architecture.num_layers
            first_config = scoring_config(config, num_layers)
        return score(first_config)


def score_first_model(
    config: RunConfig, world: World, model: FrozenModel, pairs: RunPairs, stop_flag: StopFlag
) -> RunCaches:
    """The first model's log-probabilities of all pairs; missing ones are computed.

    Collective; no layout may be running.

    Raises:
        UserError: on every rank.
        RunStopped: on every rank; a signal came. What was scored is saved.
    """
    first_config = scoring_config(config, model.source.architecture.num_layers)
    with raise_on_all_ranks("finding the first model's scores"):
        caches = RunCaches.of(first_config, pairs, model)
    with remedies_without_cache():
        if caches.are_complete():
            return caches
        with running_layout(config.layout):
            is_complete = _score(first_config, world, model, caches, stop_flag)
            # The model is in reference cycles: free its memory for step 1 now.
            gc.collect()
    if not is_complete:
        raise RunStopped
    return caches


def _score(
    config: RunConfig, world: World, model: FrozenModel, caches: RunCaches, stop_flag: StopFlag
) -> bool:
    """Load the first model and score all pairs; False if a signal stopped it.

    A separate function, so that no local keeps the model alive afterwards.
    """
    chunks, dpo = frozen_model(config, model, show_progress=world.is_first)
    rows = row_settings(config, world.size, data_rank=rank_coordinates().data_rank)
    return caches.score(Resident(dpo, chunks), rows, stop_flag)


@contextmanager
def remedies_without_cache() -> Iterator[None]:
    """Remove `reference.cache` from remedies: the first model's cache has a fixed directory.

    Raises:
        CheckpointError: the block's, with remedies that apply.
    """
    try:
        yield
    except CheckpointError as error:
        if not error.problems:  # the error of another rank, which is text only
            raise
        problems = [replace(each, remedy=_without_cache(each.remedy)) for each in error.problems]
        raise CheckpointError.of(problems) from None


def _without_cache(remedy: str) -> str:
    """A remedy without those of its choices that name `reference.cache`."""
    choices = [choice for choice in remedy.split(", or ") if "reference.cache" not in choice]
    return ", or ".join(choices) or "name another training.output"


def build_curriculum(config: RunConfig, caches: RunCaches, pairs: PairDataset) -> Curriculum:
    """Assign the training pairs to the steps. Collective.

    Raises:
        UserError: on every rank; a cache is damaged, or a step gets no pair.
    """
    assert config.sdpo is not None
    scores = caches.open()[0]
    with raise_on_all_ranks("assigning pairs to steps"):
        lengths_P2 = pairs.lengths_P3[:, 1:] if config.sdpo.length_normalised else None
        easiness = Easiness.of(scores.final_logps_P2, lengths_P2)
        sources, source_P = _unique_names(pairs.source_names), pairs.source_P
        slices = split_pairs(config.sdpo, source_P, len(sources), easiness, seed=config.data.seed)
        return Curriculum(slices, sources, source_P, easiness)


def write_curriculum(curriculum: Curriculum, path: Path) -> None:
    """Write one row per training pair and step, with its source and the first model's scores.

    A pair of no step has one row, with step 0. Not collective.

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
    with (
        CheckpointError.on_os_error(
            str(path), "cannot be written", "check that its directory exists"
        ),
        atomic_file(path) as temporary,
    ):
        pq.write_table(table, temporary, compression="zstd")


def _pairs_and_steps(curriculum: Curriculum) -> tuple[Indices, NDArray[np.int32]]:
    """Every pair with each of its steps, or with 0; sorted by pair, then by step."""
    every_P = np.arange(len(curriculum.source_P))
    unused = np.setdiff1d(every_P, np.concatenate(curriculum.slices))
    by_step = [unused, *curriculum.slices]
    pair_R = np.concatenate(by_step)
    step_R = np.repeat(np.arange(len(by_step), dtype=np.int32), [len(pairs) for pairs in by_step])
    order_R = np.lexsort((step_R, pair_R))
    return pair_R[order_R], step_R[order_R]


def step_layers(config: RunConfig, number: int, num_layers: int) -> tuple[int, ...]:
    """Intermediate layers of a step.

    Raises:
        ConfigError: the model does not have one of them.
    """
    return resolve_layers(step_config(config, number).objective.layers, num_layers)


def scoring_config(config: RunConfig, num_layers: int) -> RunConfig:
    """A configuration that scores every layer of any step into `OUTPUT/first_model`.

    Raises:
        ConfigError: the model does not have a layer of a step.
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


def _unique_names(names: Sequence[str]) -> list[str]:
    """Names of sources, numbered where one path is given twice."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique

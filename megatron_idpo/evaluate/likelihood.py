"""Layer curves of several models against one reference, as named steps, on every rank.

Each model is read at every layer, once: its log-probabilities are kept in a cache that bears the
name of what they depend on, so that a run that was interrupted goes on, a model that has changed is
read again, and two names of one model are one reading.

Models are read in one layout and one after the other; only one is in memory.
"""

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_idpo.config import RunConfig
from megatron_idpo.convert.fixed_model import FixedModel
from megatron_idpo.convert.model_source import ModelSource, open_model
from megatron_idpo.data.run_pairs import (
    RunPairs,
    check_tokens,
    load_run_pairs,
    row_settings,
    tokenizer_path,
)
from megatron_idpo.data.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, Problem
from megatron_idpo.evaluate.curves_file import DIRECTORY, FILE, write_curves
from megatron_idpo.evaluate.layer_curves import LayerCurves, layer_curves, prompt_numbers
from megatron_idpo.evaluate.likelihood_told import tell_curves
from megatron_idpo.evaluate.subjects import Subject
from megatron_idpo.mcore.groups import this_place
from megatron_idpo.mcore.signals import Stopped, StopWish, listening
from megatron_idpo.mcore.world import World, agreeing, joined_world, running
from megatron_idpo.reference.cache_files import Logps
from megatron_idpo.reference.fingerprint import fingerprint
from megatron_idpo.reference.frozen import frozen_model
from megatron_idpo.reference.live import Resident
from megatron_idpo.reference.run_caches import RunCaches

LOGPS = "logps"
_DIGITS = 12
REFERENCE = "the reference"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is the same for all models."""

    config: RunConfig
    """With every layer."""

    world: World
    pairs: RunPairs
    directory: Path
    wish: StopWish


def likelihood(config: RunConfig, models: Sequence[Subject], output: Path) -> int:
    """Compute the curves of held-out pairs, or what is missing of them.

    Args:
        config: `model` is the reference.
        models: what is compared to it.
        output: of the evaluation; results go to `likelihood/` in it.

    Returns:
        0 when all is there, `EXIT_PREEMPTED` when a signal ended it early, saved.

    Raises:
        UserError: on every rank; what was read before is there.
    """
    with listening() as wish, joined_world() as world:
        with agreeing("looking at the models"):
            reference = open_model(config.model.path)
            sources = [open_model(subject.path) for subject in models]
            _check(config, world.size, reference, dict(zip(models, sources, strict=True)))
        with agreeing("reading the data"):
            pairs = load_run_pairs(config)
            check_tokens(pairs, reference.architecture.vocab_size)
        reading = _Reading(_at_every_layer(config), world, pairs, output / DIRECTORY, wish)
        try:
            with running(config.layout.layout()):
                curves = _all_curves(reading, reference, models, sources)
        except Stopped:
            if world.is_first:
                print(_told_stopped(reading.directory), flush=True)
            return EXIT_PREEMPTED
        with agreeing("writing the curves"):
            if world.is_first:
                write_curves(reading.directory / FILE, curves)
                tell_curves(curves, reading.directory)
    return 0


def _all_curves(
    reading: _Reading,
    reference: ModelSource,
    models: Sequence[Subject],
    sources: Sequence[ModelSource],
) -> list[LayerCurves]:
    """Every model's. Collective; a layout runs."""
    held_out = reading.pairs.eval
    assert held_out is not None, "the verb has seen to it"
    answer_tokens_P2 = np.asarray(held_out.lengths_P3)[:, 1:]
    prompt_P = prompt_numbers([held_out[at].prompt_tokens for at in range(len(held_out))])
    settings = reading.config.evaluate
    reference_PL2 = _logps(reading, FixedModel.of(reference), REFERENCE)
    found = []
    for subject, source in zip(models, sources, strict=True):
        model = FixedModel.of(source)
        if subject.adapter is not None:
            model = model.with_adapter(subject.adapter)
        found.append(
            layer_curves(
                subject.name,
                _logps(reading, model, subject.name),
                reference_PL2,
                answer_tokens_P2,
                prompt_P,
                beta=reading.config.objective.beta,
                samples=settings.bootstrap_samples,
                seed=settings.seed,
            )
        )
    return found


def _logps(reading: _Reading, model: FixedModel, name: str) -> Logps:
    """A model's log-probabilities at every layer, read now or before. Collective.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came. What was read is saved.
    """
    config, held_out = reading.config, reading.pairs.eval
    assert held_out is not None, "the verb has seen to it"
    wanted = fingerprint(
        config,
        held_out,
        reading.pairs.tokenizer,
        weights=model.identity,
        num_layers=model.source.architecture.num_layers,
    )
    directory = reading.directory / LOGPS / _digest(json.dumps(wanted.as_dict()))
    what = f"held-out pairs by {name}"
    caches = RunCaches.of_one_set(model, held_out, directory, wanted, what=what)
    if not caches.are_complete():
        if not _read(reading, model, caches):
            raise Stopped
        gc.collect()  # a model holds itself in circles
    return caches.open()[0].logps_PL2


def _read(reading: _Reading, model: FixedModel, caches: RunCaches) -> bool:
    """Read what is missing; whether it is complete. Collective."""
    chunks, dpo = frozen_model(reading.config, model, show_progress=reading.world.is_first)
    rows = row_settings(reading.config, reading.world.size, data_rank=this_place().data)
    return caches.score(Resident(dpo, chunks), rows, reading.wish)


def _at_every_layer(config: RunConfig) -> RunConfig:
    """The run's, read at all layers, each at its own reference."""
    fields = {"layers": "all", "layer_weights": None, "reference_layer": "same"}
    return config.model_copy(update={"objective": config.objective.model_copy(update=fields)})


def _check(
    config: RunConfig, world_size: int, reference: ModelSource, models: dict[Subject, ModelSource]
) -> None:
    """Refuse what this world cannot run, and models that cannot be compared layer by layer."""
    wanted = reference.architecture
    found: list[Problem] = list(config.layout.layout().problems(wanted, world_size))
    vocabulary = None
    for subject, source in models.items():
        place = f"evaluate.models.{subject.name}"
        for name in ("num_layers", "vocab_size"):
            mine, other = getattr(source.architecture, name), getattr(wanted, name)
            if mine != other:
                told = f"has {name} {mine}, the reference {other}"
                remedy = "compare models that were made from the same one"
                found.append(Problem(place, told, remedy))
        if config.model.tokenizer is None and _has_tokenizer(source):
            vocabulary = vocabulary or _vocabulary(tokenizer_path(config.model))
            if _vocabulary(str(source.directory)) != vocabulary:
                told = f"{source.directory} has another tokenizer than model.path"
                remedy = "compare models of one tokenizer, or name it in model.tokenizer"
                found.append(Problem(place, told, remedy))
    if found:
        raise ConfigError.of(found)


def _has_tokenizer(source: ModelSource) -> bool:
    return source.hf is not None and any(
        path.name in ("tokenizer.json", "tokenizer.model") for path in source.companions
    )


def _vocabulary(path: str) -> str:
    return load_tokenizer(path).vocabulary_identity


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _told_stopped(directory: Path) -> str:
    return (
        f"stopped by a signal, what was read is saved in {directory}; the same command goes on "
        f"from there (exit code {EXIT_PREEMPTED})"
    )

"""Layer curves of several models against one reference. Collective: all ranks take part.

Each model is scored once, at every layer. Its log-probabilities are cached under a digest of what
they depend on: an interrupted run continues, a model that has changed is scored again, and two
names of one model share a cache.

Models are scored one after the other in the same layout; one at a time is in memory.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.hf_io.hub import fetch_models, fetch_tokenizer
from megatron_idpo.convert.model_source import FrozenModel, ModelSource, open_model
from megatron_idpo.data.run_pairs import (
    RunPairs,
    check_tokens,
    load_run_pairs,
    row_settings,
    tokenizer_path,
)
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, Problem, UserError
from megatron_idpo.evaluate.likelihood.curves_file import (
    DIRECTORY,
    FILE,
    write_curves,
    write_settings,
)
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves, layer_curves, prompt_indices
from megatron_idpo.evaluate.likelihood.summary import show_curves
from megatron_idpo.evaluate.models import OUTPUT, EvalModel, check_writable
from megatron_idpo.lora.adapter_config import read_peft_settings
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    RunStopped,
    StopFlag,
    World,
    all_gather_objects,
    catch_stop_signals,
    distributed_world,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.reference.fingerprint import fingerprint
from megatron_idpo.reference.logps_table import Logps
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.reference.score import CachePart
from megatron_idpo.reference.sources import Resident, frozen_model

LOGPS = "logps"
_DIGITS = 12
REFERENCE = "the reference"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What is the same for all models."""

    config: RunConfig
    """With taps at every layer."""

    world: World
    pairs: RunPairs
    directory: Path
    stop_flag: StopFlag
    adapters: Sequence[LoraConfig]
    """Of all models, which use the same kernels, so that equal weights round equally."""


def likelihood(config: RunConfig, models: Sequence[EvalModel], output: Path) -> int:
    """Compute the layer curves of held-out pairs. Collective.

    Args:
        config: `model` is the reference.
        models: compared to the reference.
        output: of the evaluation; results go to its subdirectory `likelihood`.

    Returns:
        0, or `EXIT_PREEMPTED` if a signal stopped the run, with finished batches saved.

    Raises:
        UserError: on every rank; finished batches are saved.
    """
    directory = output / DIRECTORY
    with catch_stop_signals() as stop_flag, distributed_world(config) as world:
        directories = fetch_models([config.model.path, *(model.path for model in models)])
        with raise_on_all_ranks("opening the models"):
            reference, *sources = map(open_model, directories)
            _check(config, world.size, reference, dict(zip(models, sources, strict=True)))
            if world.is_first:
                check_writable(directory)
        tokenizer = fetch_tokenizer(config.model.tokenizer)
        with raise_on_all_ranks("reading the data"):
            pairs = load_run_pairs(config, directories[0], tokenizer)
            check_tokens(pairs, reference.architecture.vocab_size)
        with raise_on_all_ranks("reading the adapters' settings"):
            adapters = [read_peft_settings(model.adapter) for model in models if model.adapter]
        full = _with_all_layers(config, reference.architecture.num_layers)
        scoring = _Scoring(full, world, pairs, directory, stop_flag, adapters)
        frozen = {REFERENCE: FrozenModel.of(reference)}
        for model, source in zip(models, sources, strict=True):
            plain = FrozenModel.of(source)
            frozen[model.name] = plain.with_adapter(model.adapter) if model.adapter else plain
        try:
            with running_layout(config.layout), _naming_the_output():
                scored = {name: _score(scoring, model, name) for name, model in frozen.items()}
        except RunStopped:
            if world.is_first:
                saved = f"finished batches are saved in {directory}; the same command resumes"
                logger.info("stopped by a signal; %s (exit code %d)", saved, EXIT_PREEMPTED)
            return EXIT_PREEMPTED
        with raise_on_all_ranks("writing the curves"):
            if world.is_first:
                logps = {name: logps_PL2 for name, (_, logps_PL2) in scored.items()}
                curves = _curves(scoring, logps, reference.architecture.vocab_size)
                # Never curves of one configuration next to settings of another.
                (directory / FILE).unlink(missing_ok=True)
                paths = {name: path for name, (path, _) in scored.items()}
                write_settings(directory, config, models, paths)
                write_curves(directory / FILE, curves)
                show_curves(curves, directory)
    return 0


def _curves(scoring: _Scoring, logps: dict[str, Logps], vocab_size: int) -> list[LayerCurves]:
    """The curves of all models but the reference."""
    held_out, settings = scoring.pairs.eval, scoring.config.evaluate
    assert held_out is not None
    prompt_P = prompt_indices([held_out[at].prompt_tokens for at in range(len(held_out))])
    return [
        layer_curves(
            name,
            policy_PL2,
            logps[REFERENCE],
            np.asarray(held_out.lengths_P3)[:, 1:],
            prompt_P,
            vocab_size=vocab_size,
            beta=scoring.config.objective.beta,
            samples=settings.bootstrap_samples,
            seed=settings.seed,
        )
        for name, policy_PL2 in logps.items()
        if name != REFERENCE
    ]


def _score(scoring: _Scoring, model: FrozenModel, name: str) -> tuple[str, Logps]:
    """A model's log-probabilities at every layer, from the cache or scored. Collective.

    Returns:
        The cache's path within the results, and [P, L, 2].

    Raises:
        UserError: on every rank.
        RunStopped: on every rank; a signal stopped the run, finished batches are saved.
    """
    config, held_out = scoring.config, scoring.pairs.eval
    assert held_out is not None
    current = fingerprint(
        config,
        held_out,
        scoring.pairs.tokenizer,
        weights=model.identity,
        num_layers=model.source.architecture.num_layers,
    )
    digest = hashlib.sha256(json.dumps(current.as_dict()).encode()).hexdigest()[:_DIGITS]
    directory = scoring.directory / LOGPS / digest
    part = CachePart(held_out, directory, current, "held-out pairs", f"log-probs of {name}")
    caches = RunCaches(directory, model, (part,))
    if not caches.are_complete():
        # The signal may have arrived in the last batch of the previous model.
        if any(all_gather_objects(scoring.stop_flag.stop_requested)):
            raise RunStopped
        chunks, dpo = frozen_model(
            config, model, show_progress=scoring.world.is_first, compared=scoring.adapters
        )
        rows = row_settings(config, scoring.world.size, data_rank=rank_coordinates().data_rank)
        is_complete = caches.score(Resident(dpo, chunks), rows, scoring.stop_flag)
        del chunks, dpo
        gc.collect()  # a model has reference cycles: without this, two models are in memory
        if not is_complete:
            raise RunStopped
    return f"{LOGPS}/{directory.name}", caches.open()[0].logps_PL2


def _with_all_layers(config: RunConfig, num_layers: int) -> RunConfig:
    """The configuration with taps at all layers, each against the same layer of the reference."""
    layers = "all" if num_layers > 1 else ()
    fields = {"layers": layers, "layer_weights": None, "reference_layer": "same"}
    return config.model_copy(update={"objective": config.objective.model_copy(update=fields)})


def _check(
    config: RunConfig, world_size: int, reference: ModelSource, models: dict[EvalModel, ModelSource]
) -> None:
    """The layout fits, and the models can be compared layer by layer.

    Raises:
        ConfigError: lists everything that does not fit.
    """
    problems: list[Problem] = list(config.layout.problems_for(reference.architecture, world_size))
    for model, source in models.items():
        location = f"evaluate.models.{model.name}"
        if model.adapter is not None:
            try:
                read_peft_settings(model.adapter)
            except UserError as error:
                remedy = "name the directory of a PEFT adapter"
                problems.append(Problem(f"{location}.adapter", str(error), remedy))
        for name in ("num_layers", "vocab_size"):
            value, expected = (getattr(one.architecture, name) for one in (source, reference))
            if value != expected:
                message = f"has {name} {value}, the reference {expected}"
                remedy = "compare models that were trained from the same one"
                problems.append(Problem(location, message, remedy))
        if config.model.tokenizer is None and not _has_same_tokenizer(config, source):
            message = f"{source.directory} has another tokenizer than model.path"
            remedy = "compare models with the same tokenizer, or set model.tokenizer"
            problems.append(Problem(location, message, remedy))
    if problems:
        raise ConfigError.of(problems)


def _has_same_tokenizer(config: RunConfig, source: ModelSource) -> bool:
    """Whether the model has the vocabulary of the reference, or no tokenizer files."""
    if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in source.companions):
        return True
    section = config.model.model_copy(update={"path": str(source.directory)})
    one, other = (load_tokenizer(tokenizer_path(part)) for part in (config.model, section))
    return one.encoding_identity == other.encoding_identity


@contextmanager
def _naming_the_output() -> Iterator[None]:
    """Errors of a cache name the field that sets this cache's directory."""
    try:
        yield
    except UserError as error:
        if "reference.cache" not in str(error):
            raise
        raise type(error)(str(error).replace("reference.cache", OUTPUT)) from None

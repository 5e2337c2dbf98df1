"""Layer curves of several models against one reference, as named steps, on every rank.

Each model is read at every layer, once: its log-probabilities are kept in a cache that bears the
name of what they depend on, so that a run that was interrupted goes on, a model that has changed is
read again, and two names of one model are one reading.

Models are read in one layout and one after the other; only one is in memory.
"""

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.model_source import ModelSource, open_model
from megatron_idpo.data.run_pairs import (
    RunPairs,
    check_tokens,
    load_run_pairs,
    row_settings,
    tokenizer_path,
)
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, Problem, UserError
from megatron_idpo.evaluate.likelihood.curves_file import DIRECTORY, FILE, write_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves, layer_curves, prompt_numbers
from megatron_idpo.evaluate.likelihood.settings import write_made_of
from megatron_idpo.evaluate.likelihood.summary import tell_curves
from megatron_idpo.evaluate.models import Subject
from megatron_idpo.evaluate.result_files import check_writable
from megatron_idpo.lora.peft_config import read_peft_settings
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.signals import StopFlag, Stopped, listening
from megatron_idpo.mcore.parallel.world import (
    World,
    gathered,
    joined_world,
    raise_on_all_ranks,
    running,
)
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
    stop_flag: StopFlag
    vocab_size: int
    has_adapters: bool
    """Whether any model has: then all are read by the same kernels, to round alike."""

    @property
    def held_out(self) -> PairDataset:
        """The pairs that are read; the verb has seen to it that there are some."""
        assert self.pairs.eval is not None
        return self.pairs.eval


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
    with listening() as stop_flag, joined_world() as world:
        with raise_on_all_ranks("looking at the models"):
            reference = open_model(config.model.path)
            sources = [open_model(subject.path) for subject in models]
            _check(config, world.size, reference, dict(zip(models, sources, strict=True)))
            if world.is_first:
                check_writable(output / DIRECTORY)
        with raise_on_all_ranks("reading the data"):
            pairs = load_run_pairs(config)
            check_tokens(pairs, reference.architecture.vocab_size)
        reading = _Reading(
            _at_every_layer(config, reference.architecture.num_layers),
            world,
            pairs,
            output / DIRECTORY,
            stop_flag,
            reference.architecture.vocab_size,
            any(subject.adapter is not None for subject in models),
        )
        try:
            with running(config.layout.layout()), _naming_the_output():
                found = _read_all(reading, reference, models, sources)
        except Stopped:
            if world.is_first:
                print(_format_stopped(reading.directory), flush=True)
            return EXIT_PREEMPTED
        with raise_on_all_ranks("writing the curves"):
            if world.is_first:
                names = [subject.name for subject in models]
                curves = _curves(reading, names, [one.logps_PL2 for one in found])
                (reading.directory / FILE).unlink(missing_ok=True)  # of another configuration
                readings = dict(zip([REFERENCE, *names], [one.rank for one in found], strict=True))
                write_made_of(reading.directory, config, models, readings)
                write_curves(reading.directory / FILE, curves)
                tell_curves(curves, reading.directory)
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A model's log-probabilities, and where in the results they are kept."""

    rank: str
    logps_PL2: Logps


def _read_all(
    reading: _Reading,
    reference: ModelSource,
    models: Sequence[Subject],
    sources: Sequence[ModelSource],
) -> list[_Read]:
    """The reference's log-probabilities, then every model's. Collective; a layout runs."""
    found = [_logps(reading, FrozenModel.of(reference), REFERENCE)]
    for subject, source in zip(models, sources, strict=True):
        model = FrozenModel.of(source)
        if subject.adapter is not None:
            model = model.with_adapter(subject.adapter)
        found.append(_logps(reading, model, subject.name))
    return found


def _curves(reading: _Reading, names: Sequence[str], logps: Sequence[Logps]) -> list[LayerCurves]:
    """Every model's, from what `_read_all` found: first the reference's, then theirs."""
    held_out, settings = reading.held_out, reading.config.evaluate
    prompt_P = prompt_numbers([held_out[at].prompt_tokens for at in range(len(held_out))])
    reference_PL2, *others = logps
    return [
        layer_curves(
            name,
            policy_PL2,
            reference_PL2,
            np.asarray(held_out.lengths_P3)[:, 1:],
            prompt_P,
            vocab_size=reading.vocab_size,
            beta=reading.config.objective.beta,
            samples=settings.bootstrap_samples,
            seed=settings.seed,
        )
        for name, policy_PL2 in zip(names, others, strict=True)
    ]


def _logps(reading: _Reading, model: FrozenModel, name: str) -> _Read:
    """A model's log-probabilities at every layer, read now or before. Collective.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came. What was read is saved.
    """
    config, held_out = reading.config, reading.held_out
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
        # A signal in the last batch of the model before is heeded here.
        if any(gathered(reading.stop_flag.is_there)) or not _read(reading, model, caches):
            raise Stopped
        gc.collect()  # a model holds itself in circles
    return _Read(f"{LOGPS}/{directory.name}", caches.open()[0].logps_PL2)


def _read(reading: _Reading, model: FrozenModel, caches: RunCaches) -> bool:
    """Read what is missing; whether it is complete. Collective."""
    chunks, dpo = frozen_model(
        reading.config,
        model,
        show_progress=reading.world.is_first,
        plain_linears=reading.has_adapters,
    )
    rows = row_settings(reading.config, reading.world.size, data_rank=this_rank().data)
    return caches.score(Resident(dpo, chunks), rows, reading.stop_flag)


def _at_every_layer(config: RunConfig, num_layers: int) -> RunConfig:
    """The run's, read at all layers, each at its own reference."""
    layers = "all" if num_layers > 1 else ()
    fields = {"layers": layers, "layer_weights": None, "reference_layer": "same"}
    return config.model_copy(update={"objective": config.objective.model_copy(update=fields)})


def _check(
    config: RunConfig, world_size: int, reference: ModelSource, models: dict[Subject, ModelSource]
) -> None:
    """Refuse what this world cannot run, and models that cannot be compared layer by layer."""
    wanted = reference.architecture
    found: list[Problem] = list(config.layout.layout().problems(wanted, world_size))
    vocabulary = None
    for subject, source in models.items():
        rank = f"evaluate.models.{subject.name}"
        if subject.adapter is not None:
            try:
                read_peft_settings(subject.adapter)
            except UserError as error:
                remedy = "name the directory of a PEFT adapter"
                found.append(Problem(f"{rank}.adapter", str(error), remedy))
        for name in ("num_layers", "vocab_size"):
            mine, other = getattr(source.architecture, name), getattr(wanted, name)
            if mine != other:
                message = f"has {name} {mine}, the reference {other}"
                remedy = "compare models that were made from the same one"
                found.append(Problem(rank, message, remedy))
        if config.model.tokenizer is None and _has_tokenizer(source):
            vocabulary = vocabulary or _vocabulary(tokenizer_path(config.model))
            mine = tokenizer_path(config.model.model_copy(update={"path": str(source.directory)}))
            if _vocabulary(mine) != vocabulary:
                message = f"{source.directory} has another tokenizer than model.path"
                remedy = "compare models of one tokenizer, or name it in model.tokenizer"
                found.append(Problem(rank, message, remedy))
    if found:
        raise ConfigError.of(found)


def _has_tokenizer(source: ModelSource) -> bool:
    return any(path.name in ("tokenizer.json", "tokenizer.model") for path in source.companions)


def _vocabulary(path: str) -> str:
    return load_tokenizer(path).vocabulary_identity


@contextmanager
def _naming_the_output() -> Iterator[None]:
    """Errors of a cache name the field that says where this one is."""
    try:
        yield
    except UserError as error:
        if "reference.cache" not in str(error):
            raise
        message = str(error).replace("reference.cache", "evaluate.output")
        raise type(error)(message) from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _format_stopped(directory: Path) -> str:
    return (
        f"stopped by a signal, what was read is saved in {directory}; the same command goes on "
        f"from there (exit code {EXIT_PREEMPTED})"
    )

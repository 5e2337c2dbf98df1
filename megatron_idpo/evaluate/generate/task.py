"""What one model has to do, checked before it is loaded: prompts, settings, earlier answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_idpo import __version__
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import answers_file, settings_file
from megatron_idpo.evaluate.generate.engine import (
    EngineName,
    Sampling,
    batches_at_once,
    device_name,
    versions,
)
from megatron_idpo.evaluate.generate.models import AnsweringModel, identities, tokenizer_of
from megatron_idpo.evaluate.generate.prompt_tokens import prompt_tokens, stop_tokens
from megatron_idpo.evaluate.generate.prompts import PromptRecord
from megatron_idpo.evaluate.generate.settings import (
    MADE_WITH,
    Settings,
    differences,
    read_settings,
)
from megatron_idpo.evaluate.result_files import telling

_LONG_TOLD = 5


@dataclass(frozen=True, slots=True)
class Task:
    """One model's answers to make, checked."""

    model: AnsweringModel
    tokenizer: Tokenizer
    records: Sequence[PromptRecord]
    prompts: Sequence[Sequence[int]]
    """Tokens of each record."""

    stop_tokens: Sequence[int]
    sampling: Sampling
    settings: Settings
    batch_prompts: int
    engine: EngineName
    path: Path


def make_task(
    config: RunConfig,
    model: AnsweringModel,
    run_tokenizer: Tokenizer,
    records: Sequence[PromptRecord],
    output: Path,
    engine: EngineName,
) -> Task:
    """What one model has to do, and what that depends on.

    Raises:
        DataError: a prompt cannot be rendered, or is too long.
        ConfigError: the tokenizer is not the model's.
    """
    tokenizer = tokenizer_of(model, config.model, run_tokenizer)
    prompts = prompt_tokens(records, tokenizer)
    _check_prompts(model, records, prompts, config.generate.max_new_tokens)
    stops = sorted(model.end_tokens | stop_tokens(records, tokenizer))
    chosen = config.generate
    sampling = Sampling(
        chosen.temperature,
        chosen.repetition_penalty,
        chosen.top_p,
        chosen.max_new_tokens,
        config.evaluate.seed,
    )
    settings = _settings(config, model, sampling, engine)
    settings["tokenizer"] = {"vocabulary": tokenizer.vocabulary_identity}
    settings["prompts"] = {
        "count": len(records),
        "texts": _digest([record.key for record in records]),
        "tokens": _digest(prompts),
    }
    settings["answers"]["stop_tokens"] = stops
    return Task(
        model,
        tokenizer,
        records,
        prompts,
        stops,
        sampling,
        settings,
        chosen.batch_prompts * batches_at_once(engine),
        engine,
        answers_file(output, model.name),
    )


def _settings(
    config: RunConfig, model: AnsweringModel, sampling: Sampling, engine: EngineName
) -> dict[str, dict[str, Any]]:
    """What answers depend on, but for the prompts and how they are tokenised."""
    weights, adapter_weights = identities(model)
    return {
        "model": {
            "path": str(model.directory),
            "weights": weights,
            "adapter": None if model.adapter is None else str(model.adapter),
            "adapter_weights": adapter_weights,
            "dtype": config.model.dtype,
        },
        "sampling": {**asdict(sampling), "batch_prompts": config.generate.batch_prompts},
        "answers": {"engine": engine},
        MADE_WITH: {
            "device": device_name(),
            "megatron-idpo": __version__,
            **versions(engine, has_adapter=model.adapter is not None),
        },
    }


def _check_prompts(
    model: AnsweringModel,
    records: Sequence[PromptRecord],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Refuse what the model has no positions or no embeddings for.

    Raises:
        DataError: prompts that leave no room for an answer; nothing is cut silently.
        ConfigError: the tokenizer is not the model's.
    """
    highest = max(map(max, prompts))
    if highest >= model.vocab_size:
        message = (
            f"token {highest} occurs in the prompts, but the vocabulary of {model.name} ends at "
        )
        remedy = "use the model's own tokenizer"
        raise ConfigError.at("model.tokenizer", f"{message}{model.vocab_size - 1}", remedy)
    if model.context_tokens is None:
        return
    room = model.context_tokens - max_new_tokens
    if room < 1:
        message = (
            f"is {max_new_tokens}, but {model.name} has {model.context_tokens} positions in all"
        )
        raise ConfigError.at("generate.max_new_tokens", message, "set it lower")
    long = [at for at, prompt in enumerate(prompts) if len(prompt) > room]
    if long:
        remedy = f"lower generate.max_new_tokens by {max(len(prompts[at]) for at in long) - room}"
        problems = [
            Problem(
                records[at].location,
                f"the prompt has {len(prompts[at])} tokens, and {model.name} has room for {room} "
                f"before an answer of {max_new_tokens}",
                f"{remedy}, or leave the prompt out",
            )
            for at in long[:_LONG_TOLD]
        ]
        if len(long) > _LONG_TOLD:
            problems.append(Problem("and", f"{len(long) - _LONG_TOLD} more prompts", remedy))
        raise DataError.of(problems)


def check_settings(task: Task) -> None:
    """Answers that are there are of the kind that would be made now.

    Raises:
        DataError: naming every part in which they are not.
        ConfigError: they cannot be read.
    """
    with telling(task.path, "read"):
        lines = task.path.read_bytes().count(b"\n") if task.path.exists() else 0
    if not lines:
        return
    there = read_settings(settings_file(task.path))
    remedy = f"name another directory in evaluate.output, or delete {task.path}"
    if there is None:
        raise DataError.at(str(task.path), "nothing tells what made these answers", remedy)
    found = differences(there, task.settings, finished=lines >= len(task.records))
    if found:
        message = f"these answers are not of this configuration: {'; '.join(found)}"
        raise DataError.at(str(task.path), message, remedy)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

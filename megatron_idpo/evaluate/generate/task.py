"""Generation of answers, model by model.

First everything is checked: prompts are read and tokenized, models inspected, and earlier answers
compared with the current settings. Then one model after the other is loaded and generates batch by
batch. Each batch is flushed to the disk before the next one starts, always contains the same
prompts and has its own seed, so an interrupted file is continued with the same bytes.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_idpo import __version__
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.console.progress import show_progress
from megatron_idpo.console.text import format_count
from megatron_idpo.convert.hf_io.end_tokens import GENERATION_CONFIG_FILE
from megatron_idpo.data.run_pairs import tokenizer_path
from megatron_idpo.data.tokenize.answer_end import answer_end
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import (
    Answer,
    answers_file,
    append_answers,
    recover_answers,
    settings_file,
)
from megatron_idpo.evaluate.generate.engine import (
    Engine,
    EngineName,
    batches_per_call,
    device_name,
    library_versions,
)
from megatron_idpo.evaluate.generate.models import (
    InspectedModel,
    Task,
    content_digests,
    inspect_model,
    model_tokenizer,
)
from megatron_idpo.evaluate.generate.prompt_tokens import prompt_tokens
from megatron_idpo.evaluate.generate.prompts import PromptRecord, load_prompts
from megatron_idpo.evaluate.models import OUTPUT, EvalModel, single_writer
from megatron_idpo.storage.provenance import as_problems, diff, read_record, write_record

logger = logging.getLogger(__name__)

_MADE_WITH = "made_with"
"""Section with versions and device. It has to match only while answers are missing: finished
answers stay valid when a library is updated."""

_PATHS = ("model.path", "model.adapter")
"""Parts that may differ: a copy of the same files is the same model."""

_MAX_LISTED = 5


def generate(
    config: RunConfig, models: Sequence[EvalModel], output: Path, engine: EngineName
) -> None:
    """Generates the missing answers of every model.

    Raises:
        UserError: before any model is loaded, if the problem can be known then.
    """
    tokenizer = load_tokenizer(
        tokenizer_path(config.model), config.data.chat_template if config.has("data") else None
    )
    records, skipped = load_prompts(config, has_template=tokenizer.has_chat_template)
    _log_prompts(records, skipped, tokenizer, engine)
    dtype = config.model.torch_dtype()
    tasks = [
        make_task(config, inspect_model(model, dtype, engine), tokenizer, records, output, engine)
        for model in models
    ]
    for task in tasks:
        check_settings(task)
        if task.tokenizer is not tokenizer:
            logger.info("%s uses its own tokenizer and chat template", task.model.name)
        _check_end_tokens(task)
    for task in tasks:
        with single_writer(task.path):
            check_settings(task)  # again: another process may have written in the meantime
            _generate_answers(task)


def make_task(
    config: RunConfig,
    model: InspectedModel,
    run_tokenizer: Tokenizer,
    records: Sequence[PromptRecord],
    output: Path,
    engine: EngineName,
) -> Task:
    """Tokenizes the prompts for a model, and collects what its answers depend on.

    Raises:
        DataError: a prompt cannot be rendered, or is too long.
        ConfigError: the tokenizer does not fit the model.
    """
    tokenizer = model_tokenizer(model, config.model, run_tokenizer)
    prompts = prompt_tokens(records, tokenizer)
    _check_lengths(model, records, prompts, config.generate.max_new_tokens)
    stops = sorted(model.end_tokens)
    section = config.generate
    weights, adapter_weights = content_digests(model)
    settings = {
        "model": {
            "path": str(model.directory),
            "weights": weights,
            "adapter": None if model.adapter is None else str(model.adapter),
            "adapter_weights": adapter_weights,
            "dtype": config.model.dtype,
        },
        "sampling": {
            **section.model_dump(exclude={"prompts", "max_prompts", "engine"}),
            "seed": config.evaluate.seed,
        },
        "answers": {"engine": engine, "stop_tokens": stops},
        _MADE_WITH: {
            "device": device_name(),
            "megatron-idpo": __version__,
            **library_versions(engine, has_adapter=model.adapter is not None),
        },
        "tokenizer": {"vocabulary": tokenizer.vocabulary_identity},
        "prompts": {
            "count": len(records),
            "texts": _digest([record.key for record in records]),
            "tokens": _digest(prompts),
        },
    }
    return Task(
        model,
        tokenizer,
        records,
        prompts,
        stops,
        section,
        config.evaluate.seed,
        settings,
        section.batch_prompts * batches_per_call(engine),
        engine,
        answers_file(output, model.name),
    )


def check_settings(task: Task) -> None:
    """Stored answers were made from the current settings, so that no file mixes two kinds.

    Raises:
        DataError: lists every part that differs; or the settings file is missing or damaged.
        ConfigError: the answers cannot be read.
    """
    with ConfigError.on_os_error(OUTPUT, f"cannot read {task.path}", "name another directory"):
        stored = task.path.read_bytes().count(b"\n") if task.path.exists() else 0
    if not stored:
        return
    remedy = f"name another directory in evaluate.output, or delete {task.path}"
    saved = read_record(settings_file(task.path), error=DataError, remedy=remedy)
    is_finished = stored >= len(task.records)
    differences = [
        difference
        for difference in diff(saved, task.settings)
        if difference.name not in _PATHS
        and not (is_finished and difference.name.startswith(f"{_MADE_WITH}."))
    ]
    if problems := as_problems(differences, str(task.path), remedy):
        raise DataError.of(problems)


def _check_lengths(
    model: InspectedModel,
    records: Sequence[PromptRecord],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Prompts and answers fit into the model's context and vocabulary; nothing is truncated.

    Raises:
        DataError: prompts are too long; the first are listed.
        ConfigError: the tokenizer does not fit the model.
    """
    highest = max(map(max, prompts))
    if highest >= model.vocab_size:
        message = (
            f"token {highest} occurs in the prompts, but the vocabulary of {model.name} ends at "
            f"{model.vocab_size - 1}"
        )
        raise ConfigError.at("model.tokenizer", message, "use the model's own tokenizer")
    context_tokens = model.context_tokens
    problems = [
        Problem(
            record.location,
            f"the prompt has {len(prompt)} tokens; with an answer of {max_new_tokens} it exceeds "
            f"the context of {model.name}, {context_tokens}",
            "lower generate.max_new_tokens, or leave the prompt out",
        )
        for record, prompt in zip(records, prompts, strict=True)
        if context_tokens is not None and len(prompt) + max_new_tokens > context_tokens
    ]
    if problems:
        raise DataError.of(problems[:_MAX_LISTED])


def _check_end_tokens(task: Task) -> None:
    """Warns if the model's files do not name the token that ends its answers.

    The token is not added: an exported model has to end answers where its files say.
    """
    end = answer_end(task.tokenizer)
    is_chat = any(not isinstance(record.prompt, str) for record in task.records)
    token = end.turn_end if is_chat else end.eos
    if token is None or token in task.stop_tokens:
        return
    logger.warning(
        "%s: %r (%d), which ends %s, is not an end token in the model's %s: answers may be cut off "
        "at generate.max_new_tokens; if it was trained with it, add it to eos_token_id there",
        task.model.name,
        task.tokenizer.decode([token]),
        token,
        "answers in the chat template" if is_chat else "texts of its tokenizer",
        GENERATION_CONFIG_FILE,
    )


def _generate_answers(task: Task) -> None:
    """Generates and stores the missing answers."""
    name, num_prompts = task.model.name, len(task.records)
    answers = recover_answers(task.path, num_prompts=num_prompts, batch_prompts=task.batch_prompts)
    if len(answers) == num_prompts:
        logger.info("%s, from an earlier run: %s", _summary(name, answers), task.path)
        return
    write_record(settings_file(task.path), task.settings, error=ConfigError, indent=2)
    new_tokens = 0
    with (
        closing(_load_engine(task)) as engine,
        show_progress(
            name, num_prompts, unit="answers", completed=len(answers), summary=False
        ) as progress,
    ):
        for first in range(len(answers), num_prompts, task.batch_prompts):
            batch = range(first, min(first + task.batch_prompts, num_prompts))
            outputs = engine.answer(first, [task.prompts[index] for index in batch])
            new = [_answer(task, index, out) for index, out in zip(batch, outputs, strict=True)]
            append_answers(task.path, new)
            answers += new
            new_tokens += sum(answer.answer_tokens for answer in new)
            speed = f"{new_tokens / max(progress.elapsed_s, 1e-9):,.1f} tokens/s"
            progress.advance(len(new), status=speed)
    logger.info("%s, %s: %s", _summary(name, answers), speed, task.path)


def _answer(task: Task, index: int, tokens: Sequence[int]) -> Answer:
    """Decodes a model's tokens up to the first stop token."""
    content = list(itertools.takewhile(lambda token: token not in task.stop_tokens, tokens))
    text = [token for token in content if token not in task.tokenizer.special_ids]
    record = task.records[index]
    return Answer(
        index,
        record.location,
        record.prompt,
        task.tokenizer.decode(text),
        answer_tokens=len(content),
        is_complete=len(content) < len(tokens),
    )


def _load_engine(task: Task) -> Engine:
    if task.engine == "vllm":
        from megatron_idpo.evaluate.generate.vllm_engine import VllmEngine

        return VllmEngine(task)
    from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine

    return TransformersEngine(task)


def _summary(name: str, answers: Sequence[Answer]) -> str:
    """Number of answers, their mean length, and how many the model ended."""
    mean_tokens = sum(answer.answer_tokens for answer in answers) / len(answers)
    complete = sum(answer.is_complete for answer in answers) / len(answers)
    count = format_count(len(answers), "answer")
    return f"{name}: {count}, {mean_tokens:,.1f} tokens each, {complete:.0%} complete"


def _log_prompts(
    records: Sequence[PromptRecord], skipped: int, tokenizer: Tokenizer, engine: EngineName
) -> None:
    """Prompts, engine, skipped rows, and a hint where text is not rendered as chat."""
    logger.info("%s, %s on %s", format_count(len(records), "prompt"), engine, device_name())
    if skipped:
        rows = format_count(skipped, "row")
        logger.info("skipped %s without a prompt (data.on_bad_row)", rows)
    texts = sum(isinstance(record.prompt, str) for record in records)
    if texts and tokenizer.has_chat_template:
        prompts = format_count(texts, "prompt")
        hint = "to apply it, give messages, or set data.format to single_turn"
        logger.info("%s of plain text, used without the chat template; %s", prompts, hint)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

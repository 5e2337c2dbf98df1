"""Answers of every model to the same prompts, as named steps.

First everything is checked: prompts are read and tokenised, models looked at, earlier answers
compared with what would be made now. Then one model after the other is loaded and answers batch by
batch. A batch is on the disk before the next one begins, always holds the same prompts and draws
from a seed of its own, so an interrupted file goes on as if nothing had happened.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.run_pairs import tokenizer_path
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.evaluate.counting import counted
from megatron_idpo.evaluate.generate.answers import (
    Answer,
    append_answers,
    recover_answers,
    settings_file,
)
from megatron_idpo.evaluate.generate.engine import Engine, EngineName, Weights, device_name
from megatron_idpo.evaluate.generate.models import open_answering
from megatron_idpo.evaluate.generate.progress import GenerateProgress, summary
from megatron_idpo.evaluate.generate.prompts import PromptRecord, load_prompts
from megatron_idpo.evaluate.generate.settings import write_settings
from megatron_idpo.evaluate.generate.task import Task, check_settings, make_task
from megatron_idpo.evaluate.models import Subject
from megatron_idpo.evaluate.result_files import only_writer


def generate(
    config: RunConfig, subjects: Sequence[Subject], output: Path, engine: EngineName
) -> int:
    """Answer; returns the exit code.

    Raises:
        UserError: before a model is loaded, wherever that can be known.
    """
    tokenizer = load_tokenizer(
        tokenizer_path(config.model), config.data.chat_template if config.has("data") else None
    )
    records, skipped = load_prompts(config, has_template=tokenizer.has_chat_template)
    print(_format_prompts(records, skipped, tokenizer, engine), flush=True)
    models = [open_answering(subject, engine) for subject in subjects]
    tasks = [make_task(config, model, tokenizer, records, output, engine) for model in models]
    for task in tasks:
        check_settings(task)
        if task.tokenizer is not tokenizer:
            name = task.model.name
            print(f"{name} is asked through its own tokenizer and chat template", flush=True)
    for task in tasks:
        with only_writer(task.path):
            check_settings(task)  # another process may have written since
            _answer(task)
    return 0


def _answer(task: Task) -> None:
    """Make the answers that are missing."""
    name, wanted = task.model.name, len(task.records)
    answers = recover_answers(task.path, wanted=wanted, batch_prompts=task.batch_prompts)
    if len(answers) == wanted:
        print(f"{summary(name, answers)}, were there already: {task.path}", flush=True)
        return
    write_settings(settings_file(task.path), task.settings)
    with (
        closing(_engine(task)) as engine,
        GenerateProgress(name, wanted, done=len(answers)) as progress,
    ):
        for first in range(len(answers), wanted, task.batch_prompts):
            batch = range(first, min(first + task.batch_prompts, wanted))
            tokens = engine.answer(first, [task.prompts[index] for index in batch])
            new = [_read(task, index, out) for index, out in zip(batch, tokens, strict=True)]
            append_answers(task.path, new)
            answers += new
            progress.update(new)
        progress.finish(answers, task.path)


def _read(task: Task, index: int, tokens: Sequence[int]) -> Answer:
    """What a model's tokens say, up to the one that ended the answer."""
    ends = [at for at, token in enumerate(tokens) if token in task.stop_tokens]
    said = list(tokens[: ends[0]] if ends else tokens)
    special = task.tokenizer.special_ids
    record = task.records[index]
    return Answer(
        index=index,
        location=record.location,
        prompt=record.prompt,
        answer=task.tokenizer.decode([token for token in said if token not in special]),
        answer_tokens=len(said),
        is_complete=bool(ends),
    )


def _engine(task: Task) -> Engine:
    """The model, loaded."""
    weights = Weights(task.model.directory, task.model.adapter, task.settings["model"]["dtype"])
    if task.engine == "vllm":
        from megatron_idpo.evaluate.generate.vllm_engine import VllmEngine

        longest = max(map(len, task.prompts))
        return VllmEngine(weights, task.sampling, task.stop_tokens, longest_prompt_tokens=longest)
    from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine

    return TransformersEngine(weights, task.sampling, task.stop_tokens)


def _format_prompts(
    records: Sequence[PromptRecord], skipped: int, tokenizer: Tokenizer, engine: EngineName
) -> str:
    """What will be answered, by what; what was left out; that text is not asked as a chat."""
    message = f"{counted(len(records), 'prompt')}, answered by {engine} on {device_name()}"
    if skipped:
        were = "was" if skipped == 1 else "were"
        message += f"\n{counted(skipped, 'row')} without a prompt {were} skipped (data.on_bad_row)"
    texts = sum(isinstance(record.prompt, str) for record in records)
    if texts and tokenizer.has_chat_template:
        which = "is text and is continued as it is; to ask it"
        if texts > 1:
            which = "are text and are continued as they are; to ask them"
        message += (
            f"\n{counted(texts, 'prompt')} {which} through the chat template, "
            "give messages, or set data.format to single_turn"
        )
    return message

"""Files of answers: one line per prompt, in order, written by `generate` and read by `judge`.

    answers/NAME.jsonl             {"index", "location", "prompt", "answer", "answer_tokens",
                                    "is_complete"}
    answers/NAME.settings.json     what the answers were made from (`task.py`); missing for answers
                                   that were not written by `generate`

Lines are appended batch by batch. `recover_answers` opens a file whose writer was stopped at any
point; `read_answers` requires a complete one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_idpo.console.text import format_count
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.models import OUTPUT
from megatron_idpo.storage.atomic import append_bytes, truncate_file
from megatron_idpo.storage.provenance import read_record

type Prompt = str | list[dict[str, Any]]
"""Text, or chat messages with `role` and `content`."""

_REMEDY = "correct the line, or delete the file and run `generate` again"
_DISK_REMEDY = "correct this and start again, or name another directory"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one model to one prompt."""

    index: int
    """Index of the prompt, and of the line, from 0."""

    location: str
    """Where the prompt was read, as `file:row`."""

    prompt: Prompt
    """Before any chat template."""

    answer: str

    answer_tokens: int
    """Generated tokens, without the stop token."""

    is_complete: bool
    """Whether the model ended the answer; otherwise it was cut off."""

    def line(self) -> str:
        """The line of the file, with its newline."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_ANSWER = TypeAdapter(Answer)


def answers_file(output: Path, name: str) -> Path:
    """Path of a model's answers.

    Args:
        output: directory of the evaluation (`models.evaluation_output`).
        name: of the model.
    """
    return output / "answers" / f"{name}.jsonl"


def settings_file(answers: Path) -> Path:
    """Path of the record of what a file of answers was made from."""
    return answers.with_name(f"{answers.name.removesuffix('.jsonl')}.settings.json")


def read_answers(path: Path) -> list[Answer]:
    """Reads a complete file, in the order of the prompts.

    Raises:
        DataError: the file is missing or incomplete, or a line is invalid or out of order.
    """
    if not path.exists():
        remedy = "run `megatron-idpo generate` with the same configuration first"
        raise DataError.at(str(path), "there are no answers", remedy)
    with DataError.on_os_error(str(path), "cannot be read"):
        content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line.strip()]
    answers = [_parse(line, index, path) for index, line in enumerate(lines)]
    expected = _expected_count(settings_file(path))
    if expected is not None and expected != len(answers):
        message = f"has {len(answers)} of {expected} answers: `generate` has not finished"
        raise DataError.at(str(path), message, "run it again; it resumes where it stopped")
    if not answers:
        raise DataError.at(str(path), "has no answers", _REMEDY)
    return answers


def recover_answers(path: Path, *, num_prompts: int, batch_prompts: int) -> list[Answer]:
    """Reads the complete batches of an unfinished file, and cuts off what follows them.

    A sampled answer depends on its batch, so an incomplete batch is generated again as a whole.

    Args:
        path: of the answers; may be missing.
        num_prompts: number of answers in the finished file.
        batch_prompts: prompts per batch.

    Raises:
        DataError: a complete line is invalid, or there are more answers than prompts.
        ConfigError: the file cannot be read or truncated.
    """
    if not path.exists():
        return []
    with ConfigError.on_os_error(OUTPUT, f"cannot read {path}", _DISK_REMEDY):
        lines = path.read_bytes().split(b"\n")[:-1]  # without an incomplete last line
    answers = [_parse(line, index, path) for index, line in enumerate(lines)]
    if len(answers) > num_prompts:
        counts = f"{format_count(len(answers), 'answer')} to {format_count(num_prompts, 'prompt')}"
        raise DataError.at(str(path), f"has {counts}", "delete it and run `generate` again")
    if len(answers) < num_prompts:
        answers = answers[: len(answers) - len(answers) % batch_prompts]
    with ConfigError.on_os_error(OUTPUT, f"cannot write {path}", _DISK_REMEDY):
        truncate_file(path, sum(len(line) + 1 for line in lines[: len(answers)]))
    return answers


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Appends a batch; it is on the disk on return.

    Raises:
        ConfigError: it cannot be written. `recover_answers` removes an incomplete batch.
    """
    with ConfigError.on_os_error(OUTPUT, f"cannot write {path}", _DISK_REMEDY):
        append_bytes(path, "".join(answer.line() for answer in answers).encode())


def _parse(line: bytes, index: int, path: Path) -> Answer:
    """Parses one line.

    Raises:
        DataError: it is not the answer with this index.
    """
    location = f"{path}:{index + 1}"
    try:
        answer = _ANSWER.validate_json(line, strict=True)
    except ValidationError as error:
        raise DataError.at(location, first_error(error), _REMEDY) from None
    if answer.index != index:
        message = f"has index {answer.index} instead of {index}; a line is missing or moved"
        raise DataError.at(location, message, _REMEDY)
    return answer


def first_error(error: ValidationError) -> str:
    """The first problem of an invalid JSON line."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    return f"field '{field}': {problem['msg']}" if field else problem["msg"]


def _expected_count(path: Path) -> int | None:
    """Number of answers in the finished file; None without a settings file."""
    if not path.exists():
        return None
    remedy = "delete it if the answers are complete"
    settings = read_record(path, error=DataError, remedy=remedy)
    return int(settings["prompts"]["count"])

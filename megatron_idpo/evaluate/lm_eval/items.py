"""The tasks' items from local files: found by their names, checked line by line.

A directory has, for each task, `NAME.jsonl` or one file whose name begins with the task's stem
(`FILES`), and perhaps a second one for the examples in the prompt, `STEM_train*.jsonl` or
`STEM_dev*.jsonl`. A line is what the hub's data set has in a row, of which only the fields below
are kept: without them (numbers, sources) two copies of a question are one, and neither can be an
example for the other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from megatron_idpo.checkpoint.snapshot_metadata import file_digest
from megatron_idpo.errors import ConfigError, DataError, Problem

Text = Annotated[str, Field(min_length=1)]
Record = dict[str, Any]


class _Choices(BaseModel):
    text: list[Text]
    label: list[str]


class _Arc(BaseModel):
    question: Text
    choices: _Choices
    answerKey: str

    @model_validator(mode="after")
    def _has_answer(self) -> Self:
        if len(self.choices.text) != len(self.choices.label):
            raise ValueError("choices have other numbers of texts and labels")
        if self.answerKey not in self.choices.label:
            raise ValueError(f"answerKey is {self.answerKey!r}, which is no label")
        return self


class _HellaSwag(BaseModel):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[Text]
    label: Annotated[str, BeforeValidator(str)]

    @model_validator(mode="after")
    def _has_answer(self) -> Self:
        if not (self.label.isdecimal() and int(self.label) < len(self.endings)):
            raise ValueError(f"label is {self.label!r}, which is no ending's number")
        return self


class _Mmlu(BaseModel):
    subject: Text
    question: Text
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Literal[0, 1, 2, 3]


class _Targets(BaseModel):
    choices: list[Text]
    labels: list[Literal[0, 1]]

    @model_validator(mode="after")
    def _has_answer(self) -> Self:
        if len(self.choices) != len(self.labels) or 1 not in self.labels:
            raise ValueError("needs a label for each choice, and 1 for one at least")
        return self


class _TruthfulQa(BaseModel):
    question: Text
    mc2_targets: _Targets


FILES: Mapping[str, tuple[str, type[BaseModel]]] = {
    "arc_challenge": ("arc_challenge", _Arc),
    "hellaswag": ("hellaswag", _HellaSwag),
    "mmlu": ("mmlu", _Mmlu),
    "truthfulqa_mc2": ("truthfulqa_mc", _TruthfulQa),
}
"""Task -> what its files' names begin with, and what is in a line."""

_EXAMPLES = ("_train", "_dev")


@dataclass(frozen=True, slots=True)
class Items:
    """One task's items."""

    file: Path
    asked: list[Record]
    examples: list[Record] | None
    """From which the prompt's examples are drawn; None: from `asked`, without the item itself."""

    digests: Mapping[str, str]
    """sha256 of each file that was read, by its name."""


def read_items(directory: Path, tasks: Sequence[str]) -> dict[str, Items]:
    """Each task's items.

    Raises:
        ConfigError: there is no such directory; naming every task without a file, or with several.
        DataError: a line is not what the task has.
    """
    if not directory.is_dir():
        remedy = "name the directory with the items, or leave it out to take them from the hub"
        raise ConfigError.at("h4.items", f"{directory} is no directory", remedy)
    names = sorted(path.name for path in directory.glob("*.jsonl"))
    found: dict[str, tuple[Path, Path | None]] = {}
    problems: list[Problem] = []
    for task in tasks:
        try:
            asked, examples = _names_of(task, names)
        except ConfigError as error:
            problems += error.problems
            continue
        found[task] = (directory / asked, None if examples is None else directory / examples)
    if problems:
        raise ConfigError.of(problems)
    return {task: _read(FILES[task][1], *paths) for task, paths in found.items()}


def _names_of(task: str, names: Sequence[str]) -> tuple[str, str | None]:
    """The file of a task, and the one of its examples.

    Raises:
        ConfigError: there is none, or more than one could be meant.
    """
    stem = FILES[task][0]
    mine = [name for name in names if name.startswith((stem, task))]
    examples = [name for name in mine if name.startswith(tuple(stem + end for end in _EXAMPLES))]
    asked = [name for name in mine if name not in examples]
    if f"{task}.jsonl" in asked:
        asked = [f"{task}.jsonl"]
    if not asked:
        message = f"has no items of {task}: no file {task}.jsonl, and none that begins with {stem}"
        raise ConfigError.at("h4.items", message, f"add it, or leave {task} out of h4.tasks")
    for several in (asked, examples):
        if len(several) > 1:
            message = f"has several files for {task}: {', '.join(several)}"
            remedy = f"keep one of them there, or call the one that is meant {task}.jsonl"
            raise ConfigError.at("h4.items", message, remedy)
    return asked[0], (examples[0] if examples else None)


def _read(line: type[BaseModel], file: Path, examples: Path | None) -> Items:
    paths = [file, *([] if examples is None else [examples])]
    return Items(
        file,
        _records(file, line),
        None if examples is None else _records(examples, line),
        {path.name: file_digest(path) for path in paths},
    )


def _records(path: Path, line: type[BaseModel]) -> list[Record]:
    """Every line of a file, with the task's fields alone.

    Raises:
        DataError: naming the first line that is something else.
    """
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    found.append(_record(text, line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read: {error}", "save it as UTF-8") from None
    if not found:
        raise DataError.at(str(path), "has no items", "put one on each line")
    return found


def _record(text: str, line: type[BaseModel], location: str) -> Record:
    fields = ", ".join(line.model_fields)
    remedy = f"write an object with the hub's fields {fields}"
    try:
        return line.model_validate(json.loads(text)).model_dump()
    except json.JSONDecodeError as error:
        raise DataError.at(location, f"is not JSON: {error}", remedy) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {message}" if where else message
        raise DataError.at(location, message, remedy) from None

"""Items of the tasks from local files.

A directory has `NAME.jsonl` for each task, or one file whose name begins with the task's stem
(`FORMATS`), and optionally a second file for the examples in the prompt, `STEM_train*.jsonl` or
`STEM_dev*.jsonl`. A line has the fields of the hub's data set. Only the fields below are kept:
with ids, two copies of a question would count as distinct, and each could be an example for the
other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.storage.provenance import file_digest

Text = Annotated[str, Field(min_length=1)]
Record = dict[str, Any]


class _Item(BaseModel):
    """One line; subclasses have a task's fields."""

    def is_consistent(self) -> bool:
        """Whether the answer is one of the choices."""
        return True


class _Choices(BaseModel):
    text: list[Text]
    label: list[str]


class _Arc(_Item):
    question: Text
    choices: _Choices
    answerKey: str

    def is_consistent(self) -> bool:
        labels = self.choices.label
        return len(self.choices.text) == len(labels) and self.answerKey in labels


class _HellaSwag(_Item):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[Text]
    label: Annotated[str, BeforeValidator(str)]

    def is_consistent(self) -> bool:
        return self.label.isdecimal() and int(self.label) < len(self.endings)


class _Mmlu(_Item):
    subject: Text
    question: Text
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Literal[0, 1, 2, 3]


class _Targets(BaseModel):
    choices: list[Text]
    labels: list[Literal[0, 1]]


class _TruthfulQa(_Item):
    question: Text
    mc2_targets: _Targets

    def is_consistent(self) -> bool:
        labels = self.mc2_targets.labels
        return len(self.mc2_targets.choices) == len(labels) and 1 in labels


FORMATS: Mapping[str, tuple[str, type[_Item]]] = {
    "arc_challenge": ("arc_challenge", _Arc),
    "hellaswag": ("hellaswag", _HellaSwag),
    "mmlu": ("mmlu", _Mmlu),
    "truthfulqa_mc2": ("truthfulqa_mc", _TruthfulQa),
}
"""Task -> stem of its file names, fields of a line."""


@dataclass(frozen=True, slots=True)
class Items:
    """One task's items."""

    file: Path
    asked: list[Record]
    examples: list[Record] | None
    """Examples for prompts are drawn from these; None: from `asked`, without the item itself."""

    digests: Mapping[str, str]
    """sha256 of each file by name."""


def read_items(directory: Path, tasks: Sequence[str]) -> dict[str, Items]:
    """Read the items of each task.

    Raises:
        ConfigError: there is no such directory; lists every task without a file, or with several.
        DataError: a line is not an item of its task.
    """
    if not directory.is_dir():
        remedy = "name the directory with the items, or set null to take them from the hub"
        raise ConfigError.at("h4.items", f"{directory} is not a directory", remedy)
    names = sorted(path.name for path in directory.glob("*.jsonl"))
    files: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for task in tasks:
        try:
            files[task] = _select_files(task, names)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)
    return {task: _read(directory, task, names) for task, names in files.items()}


def _select_files(task: str, names: Sequence[str]) -> list[str]:
    """A task's file, then the file of its examples if there is one."""
    stem = FORMATS[task][0]
    matching = [name for name in names if name.startswith((stem, task))]
    examples = [name for name in matching if name.startswith((f"{stem}_train", f"{stem}_dev"))]
    asked = [name for name in matching if name not in examples]
    if f"{task}.jsonl" in asked:
        asked = [f"{task}.jsonl"]
    if not asked:
        message = f"has no items of {task}: no file {task}.jsonl or {stem}*.jsonl"
        raise ConfigError.at("h4.items", message, f"add one, or leave {task} out of h4.tasks")
    for several in (asked, examples):
        if len(several) > 1:
            message = f"has several files for {task}: {', '.join(several)}"
            remedy = f"keep one of them there, or rename the right one to {task}.jsonl"
            raise ConfigError.at("h4.items", message, remedy)
    return asked + examples


def _read(directory: Path, task: str, names: Sequence[str]) -> Items:
    paths = [directory / name for name in names]
    asked, *examples = [_read_records(path, FORMATS[task][1]) for path in paths]
    digests = {path.name: file_digest(path) for path in paths}
    return Items(paths[0], asked, examples[0] if examples else None, digests)


def _read_records(path: Path, kind: type[_Item]) -> list[Record]:
    remedy = f"write objects with the hub's fields {', '.join(kind.model_fields)}"
    records = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read: {error}", "save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            item = kind.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            message = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).lstrip(": ")
            raise DataError.at(location, message, remedy) from None
        if not item.is_consistent():
            message = "has an answer that is not among its choices, or choices without labels"
            raise DataError.at(location, message, remedy)
        records.append(item.model_dump())
    if not records:
        raise DataError.at(str(path), "has no items", "put one on each line")
    return records

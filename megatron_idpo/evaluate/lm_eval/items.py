"""Items of the tasks from local files.

A directory has `NAME.jsonl` for each task, or one file whose name begins with the task's stem
(`FORMATS`), and optionally a second file for the examples in the prompt, `STEM_train*.jsonl` or
`STEM_dev*.jsonl`. A line has the fields of the hub's data set. Only the fields below are kept:
with ids, two copies of a question would count as distinct, and each could be an example for the
other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.storage.provenance import file_digest

type Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """The file of a task."""

    stem: str
    """Of its name."""

    fields: Mapping[str, type]
    """Required fields of a line."""

    has_answer: Callable[[Record], bool]
    """Whether the answer is one of the choices; may raise KeyError, TypeError, ValueError."""


FORMATS: Mapping[str, Format] = {
    "arc_challenge": Format(
        "arc_challenge",
        {"question": str, "choices": dict, "answerKey": str},
        lambda row: (
            len(_texts(row["choices"]["text"])) == len(_texts(row["choices"]["label"]))
            and row["answerKey"] in row["choices"]["label"]
        ),
    ),
    "hellaswag": Format(
        "hellaswag",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        lambda row: int(row["label"]) in range(len(_texts(row["endings"]))),
    ),
    "mmlu": Format(
        "mmlu",
        {"subject": str, "question": str, "choices": list, "answer": int},
        lambda row: len(_texts(row["choices"])) == 4 and row["answer"] in range(4),
    ),
    "truthfulqa_mc2": Format(
        "truthfulqa_mc",
        {"question": str, "mc2_targets": dict},
        lambda row: (
            len(_texts(row["mc2_targets"]["choices"])) == len(row["mc2_targets"]["labels"])
            and {1} <= set(row["mc2_targets"]["labels"]) <= {0, 1}
        ),
    ),
}
"""Task -> its file."""


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
        ConfigError: there is no such directory, or a task has no file or several.
        DataError: a line is not an item of its task.
    """
    if not directory.is_dir():
        remedy = "name the directory with the items, or set null to take them from the hub"
        raise ConfigError.at("h4.items", f"{directory} is not a directory", remedy)
    names = sorted(path.name for path in directory.glob("*.jsonl"))
    files = {task: _select_files(task, names) for task in tasks}
    return {task: _read(directory, task, selected) for task, selected in files.items()}


def _select_files(task: str, names: Sequence[str]) -> list[str]:
    """A task's file, then the file of its examples if there is one."""
    stem = FORMATS[task].stem
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
    asked, *examples = [_read_records(path, FORMATS[task]) for path in paths]
    digests = {path.name: file_digest(path) for path in paths}
    return Items(paths[0], asked, examples[0] if examples else None, digests)


def _read_records(path: Path, form: Format) -> list[Record]:
    remedy = f"write objects with the hub's fields {', '.join(form.fields)}"
    records = []
    try:
        with DataError.on_os_error(str(path), "cannot be read", remedy):
            lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError.at(str(path), f"cannot be read: {error}", "save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(_parse(line, form))
            except (KeyError, TypeError, ValueError) as error:
                message = f"is not an item ({type(error).__name__}: {error})"
                raise DataError.at(f"{path}:{number}", message, remedy) from None
    if not records:
        raise DataError.at(str(path), "has no items", "put one on each line")
    return records


def _parse(line: str, form: Format) -> Record:
    """The required fields of one line.

    Raises:
        KeyError, TypeError, ValueError: it is not an item of the task.
    """
    values = json.loads(line)
    record = {name: values[name] for name in form.fields}
    for name, kind in form.fields.items():
        if type(record[name]) is not kind:
            raise TypeError(f"{name} is {record[name]!r}, not {kind.__name__}")
    if not form.has_answer(record):
        raise ValueError("its answer is not among its choices, or choices lack labels")
    return record


def _texts(values: Any) -> list[str]:
    """A list of non-empty texts.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise TypeError(f"{values!r} is not a list of texts")
    return values

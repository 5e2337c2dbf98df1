"""Files of answers: one line for each prompt, in order, written by `generate`, read by a judge.

    answers/NAME.jsonl             {"index", "location", "prompt", "answer", "answer_tokens",
                                    "is_complete"}
    answers/NAME.settings.json     what made it (`answers_settings.py`); of answers that somebody
                                   else wrote there is none

Lines are appended batch by batch. `recover_answers` takes up a file at whatever point its writer
was stopped; `read_answers` wants a whole one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.counting import counted
from megatron_idpo.evaluate.result_files import telling

type Prompt = str | list[dict[str, Any]]
"""A text, or chat messages with `role` and `content`."""

SETTINGS_SUFFIX = ".settings.json"
_REMEDY = "correct the line, or delete the file and let `generate` write it anew"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model answered to one prompt."""

    index: int
    """The prompt's place among the prompts, from 0; the number of the line."""

    location: str
    """Where the prompt was read, as `file:row`."""

    prompt: Prompt
    """As people read it, before any chat template."""

    answer: str

    answer_tokens: int
    """Tokens that the model produced, without the one that ended the answer."""

    is_complete: bool
    """The model ended it; else it was cut off."""

    def line(self) -> str:
        """For the file, with its line break."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_KINDS: dict[str, tuple[type, ...]] = {
    "index": (int,),
    "location": (str,),
    "prompt": (str, list),
    "answer": (str,),
    "answer_tokens": (int,),
    "is_complete": (bool,),
}
assert list(_KINDS) == [field.name for field in fields(Answer)]


def answers_file(output: Path, name: str) -> Path:
    """Where a model's answers are.

    Args:
        output: of the evaluation (`subjects.evaluation_directory`).
        name: of the model.
    """
    return output / "answers" / f"{name}.jsonl"


def settings_file(answers: Path) -> Path:
    """Where it is told what made a file of answers."""
    return answers.with_name(answers.name.removesuffix(".jsonl") + SETTINGS_SUFFIX)


def read_answers(path: Path) -> list[Answer]:
    """The answers of a finished file, in the order of the prompts.

    Raises:
        DataError: there is no such file, a line is no answer or out of order, or `generate` has not
            finished it.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        remedy = "run `megatron-idpo generate` with the same configuration first"
        raise DataError.at(str(path), "there are no answers", remedy) from None
    except OSError as error:
        raise DataError.at(str(path), f"cannot be read: {error.strerror}") from None
    lines = [line for line in text.split(b"\n") if line.strip()]
    found = [_parsed(line, index, path) for index, line in enumerate(lines)]
    wanted = _wanted(settings_file(path))
    if wanted is not None and wanted != len(found):
        message = f"has {len(found)} answers of {wanted}: `generate` has not finished"
        raise DataError.at(str(path), message, "run it again, it goes on where it stopped")
    if not found:
        raise DataError.at(str(path), "holds no answers", _REMEDY)
    return found


def recover_answers(path: Path, *, wanted: int, batch_prompts: int) -> list[Answer]:
    """The answers that stay of an unfinished file; what was written after them is cut off.

    What a kill left behind, half a line or half a batch, is made again with the whole batch that it
    belongs to, since a sampled answer depends on its batch.

    Args:
        path: of the answers; need not be there.
        wanted: how many there are in the end.
        batch_prompts: prompts of a batch.

    Raises:
        DataError: a whole line is no answer, or there are more than wanted.
        ConfigError: the file cannot be read, or cannot be cut off.
    """
    with telling(path, "read"):
        if not path.exists():
            return []
        text = path.read_bytes()
    lines = text.split(b"\n")[:-1]  # what follows the last line break is half a line
    found = [_parsed(line, index, path) for index, line in enumerate(lines)]
    if len(found) > wanted:
        message = f"has {counted(len(found), 'answer')} to {counted(wanted, 'prompt')}"
        raise DataError.at(str(path), message, "delete it and let `generate` write it anew")
    if len(found) < wanted:
        found = found[: len(found) - len(found) % batch_prompts]
    with telling(path, "written"):
        _cut(path, sum(len(line) + 1 for line in lines[: len(found)]))
    return found


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Add a batch; it is on the disk afterwards.

    Raises:
        ConfigError: it cannot be written. `recover_answers` heals what there is of it.
    """
    with telling(path, "written"), path.open("ab") as file:
        file.write("".join(answer.line() for answer in answers).encode())
        file.flush()
        os.fsync(file.fileno())


def _cut(path: Path, size_bytes: int) -> None:
    """Cut a file off; one that is right is not touched."""
    if path.stat().st_size > size_bytes:
        with path.open("r+b") as file:
            file.truncate(size_bytes)
            os.fsync(file.fileno())


def _parsed(line: bytes, index: int, path: Path) -> Answer:
    """One line.

    Raises:
        DataError: it is not the answer with this index.
    """
    location = f"{path}:{index + 1}"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError.at(location, f"is not JSON: {error}", _REMEDY) from None
    if not isinstance(values, dict):
        raise DataError.at(location, f"is {values!r:.40}, not an object with fields", _REMEDY)
    for name, kinds in _KINDS.items():
        value = values.get(name)
        if name not in values:
            raise DataError.at(location, f"has no field '{name}'", _REMEDY)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise DataError.at(location, f"has the {name} {value!r:.40}", _REMEDY)
    if values["index"] != index:
        message = f"has the index {values['index']}, not {index}: lines are missing or out of order"
        raise DataError.at(location, message, _REMEDY)
    return Answer(**{name: values[name] for name in _KINDS})


def _wanted(path: Path) -> int | None:
    """How many answers are to be there; None where nothing tells."""
    try:
        settings = json.loads(path.read_text("utf-8"))
        return int(settings["prompts"]["count"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"does not tell how many answers there are ({type(error).__name__})"
        raise DataError.at(str(path), message, "delete it if the answers are complete") from None

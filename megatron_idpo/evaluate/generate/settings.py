"""What made a file of answers, so that no file ever holds answers of two kinds.

A JSON object of sections beside the answers. Every field but a path has to be the same for
answers to be added. `made_with` (versions, device) counts only while answers are missing: those
that are there stay what they are when a library is updated.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.result_files import telling

Settings = Mapping[str, Mapping[str, Any]]
"""Section -> field -> value as JSON has it."""

MADE_WITH = "made_with"

_PATHS = {"model.path", "model.adapter"}
"""Told only: a copy of the same bytes elsewhere is the same model."""

_DIGESTS = {
    "model.weights": "the model differs (weights or config.json)",
    "model.adapter_weights": "the adapter differs",
    "tokenizer.vocabulary": "the tokenizer differs",
    "prompts.texts": "the prompts differ",
    "prompts.tokens": "the prompts' tokens differ (tokenizer or chat template)",
}
"""Fields whose values say nothing to people."""

_NAMES = {
    "made_with.device": "the device",
    "prompts.count": "the number of prompts",
    "sampling.seed": "evaluate.seed",
    "model.dtype": "model.dtype",
    "answers.stop_tokens": "the tokens that end an answer",
    "answers.engine": "the engine",
}


def differences(there: Settings, wanted: Settings, *, finished: bool) -> list[str]:
    """In what answers that are there are not the wanted ones; a phrase for each field.

    Args:
        there: of the answers.
        wanted: of this run.
        finished: no answer is missing, so that versions and device do not matter.
    """
    mine, other = dict(_flat(there)), dict(_flat(wanted))
    found = []
    for name in {**other, **mine}:
        if name in _PATHS or (finished and name.startswith(f"{MADE_WITH}.")):
            continue
        if mine.get(name) == other.get(name):
            continue
        if name in _DIGESTS:
            found.append(_DIGESTS[name])
        else:
            found.append(f"{_describe(name)} is {mine.get(name)} there, {other.get(name)} here")
    return found


def read_settings(path: Path) -> Settings | None:
    """What made the answers; None where it was not told.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it holds something else.
    """
    with telling(path, "read"):
        if not path.exists():
            return None
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        message = f"cannot be read: {error}"
        raise DataError.at(str(path), message, "delete it and its answers") from None
    if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
        raise DataError.at(str(path), "holds no settings", "delete it and its answers")
    return values


def write_settings(path: Path, settings: Settings) -> None:
    """Write the file whole or not at all; it is on the disk afterwards.

    Raises:
        ConfigError: it cannot be written.
    """
    growing = path.with_name(f".{path.name}.incomplete")
    with telling(path, "written"):
        try:
            with growing.open("w", encoding="utf-8") as file:
                file.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            growing.rename(path)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                growing.unlink()
            raise


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    for section, fields in settings.items():
        for name, value in fields.items():
            yield f"{section}.{name}", value


def _describe(name: str) -> str:
    """A field in a user's words."""
    if name in _NAMES:
        return _NAMES[name]
    section, _, field = name.partition(".")
    return f"generate.{field}" if section == "sampling" else f"the version of {field}"

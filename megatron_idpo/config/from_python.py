"""Python objects as a configuration: a mapping, a `RunConfig` or a path, with keyword arguments.

The verbs read a file and words of the command line. Both are written here; locations in messages
are given back as the caller knows them. Pairs and prompts that are Python objects become files.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.yaml_tree import COMMAND_LINE, read_tree, write_yaml
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.storage.atomic import write_text

Config = str | Path | Mapping[str, Any] | RunConfig
Overrides = Mapping[str, Mapping[str, Any] | None]
"""Fields to replace, by section; None removes the section."""

_RECORDS = "records"
"""Directory in the output for pairs and prompts that were given as Python objects."""

_RECORD_FIELDS = {"data": {"train", "eval"}, "generate": {"prompts"}}
_GIVE_RECORDS = "give a list of dicts, a `datasets.Dataset` or a path"
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@contextmanager
def as_command_line(config: Config, overrides: Overrides) -> Iterator[tuple[Path, list[str]]]:
    """A configuration file and words of the command line that mean the same, within the block.

    Raises:
        ConfigError: an object cannot stand in a configuration; and those of the block, whose
            locations then name keyword arguments.
    """
    with TemporaryDirectory() as name, _locations_of_python(config):
        directory = Path(name)
        if isinstance(config, RunConfig):
            config = _sections(config.dump(), directory)
        if isinstance(config, Mapping):
            given: dict[str, Any] | None = {
                str(section): _plain(fields, str(section)) for section, fields in config.items()
            }
            path = directory / "config"
        else:
            given, path = None, Path(config)
        replaced = {section: _plain(fields, section) for section, fields in overrides.items()}
        stored = given
        if stored is None:
            stored = read_tree(path).values if path.exists() else {}
        root = _output(stored, replaced, directory)
        if given is not None:
            _store_records(given, root)
            path.write_text(write_yaml(given), encoding="utf-8")
        _store_records(replaced, root)
        yield path, list(_words(replaced))


@contextmanager
def _locations_of_python(config: Config) -> Iterator[None]:
    """Names keyword arguments instead of the command line, and no line of a file of ours."""
    try:
        yield
    except UserError as error:
        problems = []
        for problem in error.problems:
            location = problem.location.replace(f"({COMMAND_LINE})", "(keyword argument)")
            if not isinstance(config, str | Path):
                location = re.sub(r" \(config:\d+\)$", "", location)
            problems.append(replace(problem, location=location))
        if tuple(problems) == error.problems:
            raise
        raise type(error).of(problems) from None


def _sections(text: str, directory: Path) -> dict[str, Any]:
    path = directory / "run_config"
    path.write_text(text, encoding="utf-8")
    return read_tree(path).values


def _output(sections: Mapping[str, Any], replaced: Mapping[str, Any], default: Path) -> Path:
    """Where records are stored: the output of the run or of the evaluation."""
    for section in ("training", "evaluate"):
        for fields in (replaced.get(section), sections.get(section)):
            if isinstance(fields, Mapping) and isinstance(output := fields.get("output"), str):
                return Path(output).expanduser()
    return default


# ---- values -------------------------------------------------------------------------------------


def _plain(value: Any, location: str) -> Any:
    """A copy with the types of YAML, and with pairs and prompts as they are.

    Raises:
        ConfigError: the object means nothing in a configuration.
    """
    if _is_library_object(value, "datasets", ("DatasetDict", "IterableDatasetDict")):
        names = ", ".join(value)
        message = f"is a {type(value).__name__} with the splits {names}"
        raise ConfigError.at(location, message, "give one of them, such as `dataset['train']`")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if _is_library_object(value, "torch", ("dtype",)):
        name = str(value).removeprefix("torch.")
        return _DTYPES.get(name, name)
    if isinstance(value, Mapping):
        return {name: _plain(inner, f"{location}.{name}") for name, inner in value.items()}
    if isinstance(value, tuple | list):
        if _is_records(value):
            return list(value)
        return [_plain(inner, f"{location}.{index}") for index, inner in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float) or _is_pairs(location):
        return value
    message = f"is an object of type {type(value).__name__}"
    raise ConfigError.at(location, message, "give plain values: numbers, text, lists, mappings")


def _is_library_object(value: object, library: str, names: tuple[str, ...]) -> bool:
    """Without importing a library that the caller did not."""
    module = sys.modules.get(library)
    return module is not None and isinstance(value, tuple(getattr(module, name) for name in names))


def _words(overrides: Mapping[str, Any]) -> Iterator[str]:
    """`section.field=value`, with the value in JSON, which is YAML."""
    for section, fields in overrides.items():
        if fields is None:
            yield f"{section}=null"
            continue
        if not isinstance(fields, Mapping):
            message, remedy = f"is {fields!r}", "give a mapping of fields, or None"
            raise ConfigError.at(section, message, remedy)
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError.at(f"{section}.{name}", f"is {value}", "give a finite number")
            yield f"{section}.{name}={json.dumps(value, ensure_ascii=False)}"


# ---- records ------------------------------------------------------------------------------------


def _is_pairs(location: str) -> bool:
    """Whether records may stand there: `data.train`, `data.eval.1.path`."""
    section, _, rest = location.partition(".")
    return rest.split(".")[0] in _RECORD_FIELDS.get(section, set())


def _is_records(values: Any) -> bool:
    """A list of records, and not of sources; a record may have a column `path`."""
    return bool(values) and all(
        isinstance(value, Mapping) and not _is_source(value) for value in values
    )


def _is_source(value: Mapping[str, Any]) -> bool:
    return "path" in value and value.keys() <= SourceConfig.model_fields.keys()


def _store_records(sections: dict[str, Any], root: Path) -> None:
    """Replace pairs and prompts that are Python objects by files with them, in place."""
    for section, names in _RECORD_FIELDS.items():
        fields = sections.get(section)
        if isinstance(fields, dict):
            for name in names & fields.keys():
                fields[name] = _stored(fields[name], root / _RECORDS, f"{section}.{name}")


def _stored(source: Any, directory: Path, location: str) -> Any:
    if isinstance(source, str) or source is None:
        return source
    if isinstance(source, Mapping):
        if "path" not in source:
            return source  # reported by the section
        return {**source, "path": _stored(source["path"], directory, f"{location}.path")}
    if isinstance(source, list) and not _is_records(source):
        return [
            _stored(part, directory, f"{location}.{index}") for index, part in enumerate(source)
        ]
    return str(_write_records(source, directory, location))


def _write_records(records: Iterable[Any], directory: Path, location: str) -> Path:
    """A file named for its content, so that every rank writes the same one."""
    if not isinstance(records, Iterable) or hasattr(records, "to_records"):  # a DataFrame
        message = f"is an object of type {type(records).__name__}"
        raise ConfigError.at(location, message, _GIVE_RECORDS)
    text = "".join(_line(record, f"{location}[{at}]") for at, record in enumerate(records))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = directory / f"{digest}.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, text, concurrent=True)
    return path


def _line(record: Any, location: str) -> str:
    if not isinstance(record, Mapping):
        message = f"is an object of type {type(record).__name__}, not a record"
        raise ConfigError.at(location, message, _GIVE_RECORDS)
    try:
        return f"{json.dumps(dict(record), ensure_ascii=False)}\n"
    except TypeError as error:
        raise ConfigError.at(location, str(error), "convert it, or leave the column out") from None

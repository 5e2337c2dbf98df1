"""A second reading of a configuration, which shares no code with `megatron_idpo.config`.

PyYAML's `BaseLoader` gives every scalar as the text that was written. `differences` compares that
text with the values of a loaded configuration.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

NULL = ("null", "Null", "NULL", "~", "")


def read(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Sections of text, after overrides."""
    tree = yaml.load(text, yaml.BaseLoader) or {}
    for override in overrides:
        name, _, value = override.partition("=")
        *above, last = name.split(".")
        target = tree
        for key in above:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[last] = yaml.load(value, yaml.BaseLoader)
    return {name: value for name, value in tree.items() if value not in NULL}


def differences(config: BaseModel, sections: Mapping[str, Any]) -> Iterator[str]:
    """Where a loaded configuration is not what the text says."""
    for name, field in type(config).model_fields.items():
        value = config.__dict__.get(name)
        if name in sections:
            yield from _compare(name, value, sections[name])
        elif value is not None and value != field.default:
            yield f"{name}: is {value!r}, but is not written"
    yield from (f"{name}: is ignored" for name in sections.keys() - type(config).model_fields)


def _compare(where: str, value: Any, written: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from _compare_section(where, value, written)
    elif isinstance(value, tuple | list):
        if not isinstance(written, list):  # one source in place of a list
            written = [written]
        if len(value) != len(written):
            yield f"{where}: {len(value)} values for {len(written)}"
        for index, pair in enumerate(zip(value, written, strict=False)):
            yield from _compare(f"{where}.{index}", *pair)
    elif isinstance(value, Mapping):
        if not isinstance(written, dict) or value.keys() != written.keys():
            yield f"{where}: {value!r} for {written!r}"
        else:
            for key in value:
                yield from _compare(f"{where}.{key}", value[key], written[key])
    elif not isinstance(written, str) or not _means(value, written):
        yield f"{where}: {value!r} for {written!r}"


def _compare_section(where: str, value: BaseModel, written: Any) -> Iterator[str]:
    if isinstance(written, str):  # a path in place of `{path: ...}`
        written = {"path": written}
    if not isinstance(written, dict):
        yield f"{where}: a section for {written!r}"
        return
    for name, field in type(value).model_fields.items():
        inner = getattr(value, name)
        if name in written:
            yield from _compare(f"{where}.{name}", inner, written[name])
        elif inner != field.default:
            yield f"{where}.{name}: is {inner!r}, but is not written"
    yield from (f"{where}.{key}: is ignored" for key in written.keys() - type(value).model_fields)


def _means(value: Any, written: str) -> bool:
    """Whether this text is this value."""
    if value is None:
        return written in NULL
    if isinstance(value, bool):
        return written.lower() == str(value).lower()
    if isinstance(value, int | float):
        return written not in NULL and float(written) == value
    return value in (written, os.path.expanduser(written))

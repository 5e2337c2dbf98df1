"""Configurations on the page: what is not as by default, and where runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_idpo.config.run_config import RunConfig, section_class
from megatron_idpo.config.sdpo import SdpoStepConfig
from megatron_idpo.config.sections import Section, SourceConfig
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.evaluate.report.format import NOTHING, setting

_OWN = "training.output"
"""Differs between any two runs."""


def own_settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What somebody has set: fields without a default, and those that are not as by default."""
    return [
        (name, format_setting(value))
        for name, value in _flattened(config).items()
        if value != _default(name)
    ]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Fields in which not all configurations agree, with the value in each.

    A section that some do not have (LoRA, sDPO) is a field of its own; its fields are told as far
    as they are not as by default.
    """
    flat = [_flattened(config) for config in configs]
    found = [
        (section, ["yes" if section in config else NOTHING for config in configs])
        for section in dict.fromkeys(name for config in configs for name in config)
        if not all(section in config for config in configs)
    ]
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one.get(name, _default(name)) for one in flat]
        if name != _OWN and any(value != values[0] for value in values):
            message = [format_setting(one[name]) if name in one else NOTHING for one in flat]
            found.append((name, message))
    return found


def as_yaml(config: Mapping[str, Any]) -> str:
    """The whole configuration."""
    return write_yaml(dict(config))


def format_setting(value: Any) -> str:
    """A value in words; of sources and steps what is not as by default."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return "; ".join(map(_format_part, value))
    return setting(value)


def _format_part(part: Mapping[str, Any]) -> str:
    defaults: dict[str, Any] = {}
    for kind in (SourceConfig, SdpoStepConfig):
        if set(part) <= set(kind.model_fields):
            defaults = {name: _field_default(kind, name) for name in part}
    own = {
        name: _without_nulls(value) for name, value in part.items() if value != defaults.get(name)
    }
    return str(own["path"]) if set(own) == {"path"} else setting(own)


def _without_nulls(value: Any) -> Any:
    """Of a section within a source or step, what is set."""
    if not isinstance(value, Mapping):
        return value
    return {name: one for name, one in value.items() if one is not None}


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` and its value."""
    return {
        f"{section}.{name}": value
        for section, fields in config.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
    }


def _default(name: str) -> Any:
    """The default of `section.field` as YAML has it; equal to nothing where there is none."""
    section, _, field = name.partition(".")
    about = RunConfig.model_fields.get(section)
    return PydanticUndefined if about is None else _field_default(section_class(about), field)


def _field_default(section: type[Section], name: str) -> Any:
    field = section.model_fields.get(name)
    if field is None or field.default is PydanticUndefined:
        return PydanticUndefined
    return to_jsonable_python(field.default)

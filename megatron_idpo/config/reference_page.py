"""The reference page of the configuration, generated from the sections themselves.

`python -m megatron_idpo.config.reference_page` prints `docs/configuration.md`; a test compares.
"""

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_idpo.config.data import ColumnsConfig, SourceConfig
from megatron_idpo.config.evaluate import EvalModelConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.config.objective import Layers
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoStepConfig
from megatron_idpo.config.section import Section, section_class
from megatron_idpo.config.training import WandbConfig

_HEAD = """# Configuration

<!-- Generated: python -m megatron_idpo.config.reference_page > docs/configuration.md -->

One YAML file serves every verb: `megatron-idpo VERB CONFIG.yaml [section.field=value …]`. A verb
reads the sections it needs and ignores the others, but the whole file is checked: unknown
sections and fields, wrong types, fields without effect and impossible combinations are reported
together, before anything is loaded. On the command line `section.field=value` sets a field,
with the value in YAML, and `section=null` removes a section. Scalars follow YAML 1.2: `1e-4` is a
number, `true` and `false` are the only booleans.
"""


def config_reference() -> str:
    """Every field of every section with type, default and meaning, as Markdown."""
    parts = [_HEAD]
    for name, info in RunConfig.model_fields.items():
        section = section_class(info)
        optional = "" if info.is_required() or info.default is not None else " (optional)"
        parts.append(f"## `{name}`{optional}\n\n{section.__doc__}\n\n{_table(section)}")
    for title, section in (
        ("Sources of pairs", SourceConfig),
        ("Columns of a source", ColumnsConfig),
        ("Steps of `sdpo`", SdpoStepConfig),
        ("`logging.wandb`", WandbConfig),
        ("Models of `evaluate`", EvalModelConfig),
    ):
        parts.append(f"### {title}\n\n{section.__doc__}\n\n{_table(section)}")
    return "\n".join(parts)


def _table(section: type[BaseModel]) -> str:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "*required*" if field.is_required() else f"`{_value(field.default)}`"
        meaning = (field.description or "").replace("\n", " ").replace("|", r"\|")
        lines.append(f"| `{name}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Section):
        return json.dumps(value.model_dump(exclude_defaults=True))
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation, field.metadata).replace("|", r"\|")


def _type_name(annotation: Any, metadata: Any = ()) -> str:
    arguments = get_args(annotation)
    if annotation == get_args(Layers)[0]:
        return "list of layers, {every: n}, or `all`"
    if annotation in (WandbConfig, Layout, SdpoStepConfig, ColumnsConfig):
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        bounds = [part for data in annotation.__metadata__ for part in _parts(data)]
        return _type_name(annotation.__origin__, bounds)
    if get_origin(annotation) is Literal:
        return " | ".join(f"`{choice}`" for choice in arguments)
    if get_origin(annotation) is Mapping:
        return "mapping of name to path or model"
    if get_origin(annotation) is tuple:
        if arguments[0] is SourceConfig:
            return "path, source, or list of them"
        return f"list of {_type_name(arguments[0])}"
    if arguments:
        return " | ".join("null" if a is NoneType else _type_name(a) for a in arguments)
    name = {bool: "true | false", int: "integer", float: "number", str: "text"}[annotation]
    return " ".join([name, *_bounds(metadata)])


def _parts(data: Any) -> list[Any]:
    """A `Field(gt=…)` inside `Annotated` has its bounds in its own metadata."""
    return data.metadata if isinstance(data, FieldInfo) else [data]


def _bounds(metadata: Any) -> list[str]:
    signs = ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le"))
    return [
        f"{sign} {getattr(bound, name)}"
        for bound in metadata
        for kind, sign, name in signs
        if isinstance(bound, kind)
    ]


if __name__ == "__main__":
    print(config_reference(), end="")

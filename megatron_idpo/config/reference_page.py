"""The reference page of the configuration, generated from the sections themselves.

`python -m megatron_idpo.config.reference_page` prints `docs/configuration.md`; a test compares.
"""

import json
import re
from typing import Any

from pydantic import BaseModel

from megatron_idpo.config.data import ColumnsConfig, SourceConfig
from megatron_idpo.config.evaluate import EvalModelConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoStepConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.config.training import WandbConfig

_HEAD = """# Configuration

<!-- Generated: python -m megatron_idpo.config.reference_page > docs/configuration.md -->

One YAML file serves every verb: `megatron-idpo VERB CONFIG.yaml [section.field=value …]`. A verb
reads the sections it needs and ignores the others, but the whole file is checked: unknown
sections and fields, wrong types, fields without effect and impossible combinations are reported
together, before anything is loaded. Names of TRL, PEFT and Transformers get a hint at ours. On the
command line `section.field=value` or `--section.field=value` sets a field, with the value in YAML,
and `section=null` removes a section, which a message confirms. A key without a value, such as
`lora=` with an unset shell variable, is an error. Scalars follow YAML 1.2: `1e-4` is a number,
`true` and `false` are the only booleans. Tags are refused, and environment variables in values are
not replaced. Numbers are limited to 32 bits.
"""


_TYPES = {"string": "text", "object": "mapping"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def config_reference() -> str:
    """Every field of every section with type, default and meaning, as Markdown."""
    parts = [_HEAD]
    for name, info in RunConfig.model_fields.items():
        optional = "" if info.is_required() or info.default is not None else " (optional)"
        parts.append(_part(f"## `{name}`{optional}", section_class(info)))
    for title, section in (
        ("Sources of pairs", SourceConfig),
        ("Columns of a source", ColumnsConfig),
        ("Steps of `sdpo`", SdpoStepConfig),
        ("`logging.wandb`", WandbConfig),
        ("Models of `evaluate`", EvalModelConfig),
    ):
        parts.append(_part(f"### {title}", section))
    # Docstrings name documents by their paths in the repository; the page is one of them.
    return re.sub(r"\(docs/(\w+\.md)\)", r"([\1](\1))", "\n".join(parts))


def _part(heading: str, section: type[BaseModel]) -> str:
    schema = section.model_json_schema()
    lines = [heading, "", schema["description"], ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        is_required = name in schema.get("required", ())
        default = "*required*" if is_required else f"`{_value(field['default'])}`"
        meaning = field["description"].replace("\n", " ")
        cells = (f"`{name}`", _type(field), default, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', r'\|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):  # a section; fields that are null are not written
        value = {name: part for name, part in value.items() if part is not None}
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "object")
    if kind == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        return f"list of {_type(items)}"
    if kind == "boolean":
        return "true | false"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_TYPES.get(kind, kind), *bounds])


if __name__ == "__main__":
    print(config_reference(), end="")

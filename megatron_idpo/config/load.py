"""Reading a configuration: one YAML file for every verb, with overrides, checked as a whole.

`load_config` reports every problem at once, each with its location, the value and a remedy: unknown
sections and fields with the nearest name, wrong types, fields without effect, missing sections. A
section of another verb is checked and not used. An override of such a section is an error, because
it would have no effect. A section that is null is removed, and a log message says so.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_idpo.config.other_names import other_name, other_value
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.sdpo_steps import step_problems
from megatron_idpo.config.section import describe_errors, section_class, suggest
from megatron_idpo.config.yaml_tree import COMMAND_LINE, Tree, read_tree, shown
from megatron_idpo.errors import ConfigError, Problem

_LOG = logging.getLogger(__name__)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    required: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: a YAML file.
        overrides: `section.field=value`, with YAML values; `section=null` removes a section.
        required: the sections that the verb needs.
        optional: further sections that it reads if they are present.

    Raises:
        ConfigError: with every problem in the file and in the overrides.
    """
    required, optional = tuple(required), tuple(optional)
    assert {*required, *optional} <= set(SECTIONS), f"unknown among {required}, {optional}"
    tree = read_tree(path, overrides)
    problems = _unused_overrides(tree, {*required, *optional})
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in tree.values:
            _read_section(name, field, tree, sections, problems)
        elif not field.is_required():
            sections[name] = field.default
        elif name in required:
            fields = section_class(field).model_fields
            needed = [f"{name}.{inner}" for inner in fields if fields[inner].is_required()]
            remedy = f"add it, with at least {', '.join(needed)}"
            location = tree.location((name,)) if name in tree.removed else name
            problems.append(Problem(location, "the section is missing", remedy))
    for name in sorted((tree.values.keys() | tree.removed) - set(SECTIONS)):
        remedy = remedy_for(name) or suggest(name, SECTIONS, "sections")
        problems.append(Problem(tree.location((name,)), "unknown section", remedy))
    # A value that could not be read is not reported again as one that is null.
    unread = {problem.location for problem in tree.problems}
    problems = [*tree.problems, *(one for one in problems if one.location not in unread)]
    config = RunConfig.model_construct(**sections)
    if not problems:  # sections that are incomplete cannot be compared
        for problem in (*config.problems(), *step_problems(config)):
            location = tree.location(tuple(problem.location.split(".")))
            problems.append(replace(problem, location=location))
    if problems:
        raise ConfigError.of(problems)
    _log_removed(tree)
    return config


def _log_removed(tree: Tree) -> None:
    """A null in a file may be an accident; on the command line it is what was asked for."""
    for name in sorted(tree.removed - tree.values.keys()):
        if tree.origins.get((name,)) != COMMAND_LINE:
            _LOG.info("%s: null, so this section is left out", tree.location((name,)))


def _unused_overrides(tree: Tree, used: set[str]) -> list[Problem]:
    overridden = {keys[0] for keys, origin in tree.origins.items() if origin == COMMAND_LINE}
    message = "has no effect: this verb does not read the section"
    unused = [name for name in SECTIONS if name in overridden - used]
    return [Problem(f"{name} ({COMMAND_LINE})", message, "leave it out") for name in unused]


def _read_section(
    name: str, field: FieldInfo, tree: Tree, sections: dict[str, Any], problems: list[Problem]
) -> None:
    """Validate one section into `sections`, or append its `problems`."""
    values, section = tree.values[name], section_class(field)
    if not isinstance(values, dict):
        message = f"is {shown(values)}, not a mapping of fields"
        first = next(iter(section.model_fields))
        remedy = other_value(name, "", values) or (
            f"write fields, such as `{name}.{first}`, under it, or remove it"
        )
        problems.append(Problem(tree.location((name,)), message, remedy))
        return
    try:
        sections[name] = section.model_validate(values)
    except ValidationError as error:
        problems += describe_errors(error, section, (name,), tree.location, fields_by_name())


def remedy_for(name: str) -> str | None:
    """What to write in place of a name that stands outside of the sections, if it is known."""
    if (hint := other_name("", name)) is not None:
        return hint
    place = fields_by_name().get(name)
    return place and f"did you mean {place}?"


def fields_by_name() -> dict[str, str]:
    """Where each name belongs: "`data.seed` or `training.seed`", or "the section `lora`"."""
    places: dict[str, list[str]] = {name: [f"the section `{name}`"] for name in SECTIONS}
    for section, field in RunConfig.model_fields.items():
        for name in section_class(field).model_fields:
            places.setdefault(name, []).append(f"`{section}.{name}`")
    return {name: " or ".join(where) for name, where in places.items()}

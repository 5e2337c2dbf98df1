"""One configuration file for every verb: read, checked as a whole, resolved, written down again.

`load_config` reads a YAML file and `section.field=value` overrides and tells every mistake at
once, each with its place, the value and a remedy: unknown sections and fields with the nearest
name, wrong types, fields that the others leave unread, what is missing. A file serves all verbs, so
a section that belongs to another verb is checked and left alone; an override of such a section is a
mistake, because nobody writes one to have no effect.

Here is also what concerns several sections. The sections themselves are in `config_sections.py`.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_idpo.config.evaluate import EvaluateConfig, GenerateConfig, H4Config, JudgeConfig
from megatron_idpo.config.objective import LoraConfig, ObjectiveConfig, ReferenceConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_problems
from megatron_idpo.config.sections import (
    DataConfig,
    LayoutConfig,
    ModelConfig,
    Section,
    SectionError,
)
from megatron_idpo.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_idpo.config.yaml_tree import COMMAND_LINE, Keys, Tree, read_tree, write_yaml
from megatron_idpo.errors import ConfigError, Problem


class RunConfig(Section):
    """Everything a run may be told.

    A section that the file does not have and that a verb does not require is absent: reading it is
    an AttributeError, that is, a verb that uses a section it never asked for.
    """

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = None
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    reference: ReferenceConfig = ReferenceConfig()
    sdpo: SdpoConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig | None = None
    h4: H4Config = H4Config()

    def has(self, section: str) -> bool:
        """Whether a section is there, written or by its defaults."""
        return self.__dict__.get(section) is not None

    def problems(self) -> list[Problem]:
        """What is wrong between sections; `Problem.place` is `section.field`."""
        return [
            *self._uneven_shards(),
            *self._without_held_out_pairs(),
            *self._without_scores(),
            *self._wrong_reference(),
            *self._wrong_steps(),
        ]

    def _uneven_shards(self) -> list[Problem]:
        if not (self.has("data") and self.layout.sequence_parallel):
            return []
        tensor = self.layout.tensor
        lengths = {"row_tokens": self.data.row_tokens}
        if self.data.trim_tokens < self.data.row_tokens:  # or nothing is cut
            lengths["trim_tokens"] = self.data.trim_tokens
        return [
            Problem(
                f"data.{name}",
                f"is {tokens}, which sequence parallelism cannot split over "
                f"layout.tensor = {tensor}",
                f"use {tokens + -tokens % tensor}",
            )
            for name, tokens in lengths.items()
            if tokens % tensor
        ]

    def _without_held_out_pairs(self) -> list[Problem]:
        """Fields that need an evaluation, where nothing is held out."""
        if not self.has("data") or self.data.holds_out:
            return []
        wishes = {
            "training.eval_every_steps": self.has("training") and self.training.eval_every_steps,
            "checkpoint.keep_best": self.checkpoint.keep_best,
        }
        remedy = "name held-out pairs in data.eval, or set data.eval_fraction"
        return [
            Problem(name, f"is {value}, but there are no held-out pairs", remedy)
            for name, value in wishes.items()
            if value
        ]

    def _without_scores(self) -> list[Problem]:
        """`keep_best`, where evaluations and saves do not fall on the same steps."""
        best, save = self.checkpoint.keep_best, self.checkpoint.every_steps
        unheld = self.has("data") and not self.data.holds_out  # has been told
        if not best or not self.has("training") or unheld:
            return []
        evaluate = self.training.eval_every_steps
        if save is None:
            message = "but checkpoint.every_steps is null: only the last step is saved"
            remedy = f"set checkpoint.every_steps to {evaluate}"
            if evaluate is None:
                default = type(self.checkpoint).model_fields["every_steps"].default
                remedy = f"set it and training.eval_every_steps to {default}"
        elif evaluate is None:
            message = "but training.eval_every_steps is null: only the last step is evaluated"
            remedy = f"set training.eval_every_steps to {save}"
        elif save % evaluate and evaluate % save:
            message = f"but every {save} steps are saved, and every {evaluate} evaluated"
            remedy = f"set checkpoint.every_steps to {save + -save % evaluate}, or "
            remedy += f"training.eval_every_steps to {save}"
        else:
            return []
        return [Problem("checkpoint.keep_best", f"is {best}, {message}", remedy)]

    def _wrong_reference(self) -> list[Problem]:
        if self.reference.source != "adapter_off" or self.has("lora"):
            return []
        remedy = "use cache, or add the section lora"
        return [Problem("reference.source", "is adapter_off, but there are no adapters", remedy)]

    def _wrong_steps(self) -> list[Problem]:
        """Of sDPO; where there is no training, nothing of it is read."""
        return step_problems(self) if self.has("training") and self.has("optimizer") else []

    def dump(self) -> str:
        """The resolved configuration as YAML; `load_config` reads the same value from it.

        Of what concerns evaluation alone only what differs from the defaults is told.
        """
        defaults = {name: RunConfig.model_fields[name].default for name in EVALUATION}
        silent = {name for name, default in defaults.items() if getattr(self, name) == default}
        sections = self.model_dump(mode="json", exclude=silent)
        return write_yaml({name: value for name, value in sections.items() if value is not None})


EVALUATION = ("evaluate", "generate", "judge", "h4")
"""The sections that training does not read."""


SECTIONS = tuple(RunConfig.model_fields)


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
        required: the sections that the verb cannot do without.
        optional: further sections that it reads where they are.

    Raises:
        ConfigError: naming every mistake in the file and in the overrides.
    """
    required, optional = tuple(required), tuple(optional)
    assert {*required, *optional} <= set(SECTIONS), f"unknown among {required}, {optional}"
    tree = read_tree(path, overrides)
    found = list(tree.problems)
    found += _unread_overrides(tree, {*required, *optional})
    sections: dict[str, Any] = {}
    for name, info in RunConfig.model_fields.items():
        if name in tree.values:
            _read_section(name, info, tree, sections, found)
        elif info.is_required() and name in required:
            found.append(_missing_section(name, info))
        elif not info.is_required():
            sections[name] = info.default
    for name in tree.values.keys() - set(SECTIONS):
        remedy = _nearest(name, SECTIONS, "sections")
        found.append(Problem(tree.location((name,)), "unknown section", remedy))
    config = RunConfig.model_construct(**sections)
    if not found:
        found = [
            Problem(
                tree.location(tuple(problem.location.split("."))), problem.message, problem.remedy
            )
            for problem in config.problems()
        ]
    if found:
        raise ConfigError.of(found)
    return config


def _unread_overrides(tree: Tree, read: set[str]) -> list[Problem]:
    names = {
        str(keys[0]): None
        for keys, origin in tree.origins.items()
        if origin == COMMAND_LINE and keys[0] in SECTIONS and keys[0] not in read
    }
    return [
        Problem(
            f"{name} ({COMMAND_LINE})", "would not be read: no part of this verb", "leave it out"
        )
        for name in names
    ]


def _read_section(
    name: str, info: FieldInfo, tree: Tree, sections: dict[str, Any], found: list[Problem]
) -> None:
    """Validate one section into `sections`, or its mistakes into `found`."""
    values, section = tree.values[name], section_class(info)
    if not isinstance(values, dict):
        message = "is empty" if values is None else f"is {values!r}, not a mapping of fields"
        first = next(iter(section.model_fields))
        remedy = f"write fields, such as `{name}.{first}`, under it, or remove it"
        found.append(Problem(tree.location((name,)), message, remedy))
        return
    try:
        sections[name] = section.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            found.extend(_describe(detail, section, (name, *detail["loc"]), tree))


def _describe(detail: Any, section: type[BaseModel], keys: Keys, tree: Tree) -> list[Problem]:
    """What pydantic found, in a user's words."""
    location, kind, context = tree.location(keys), detail["type"], detail.get("ctx", {})
    if kind == "value_error" and isinstance(context["error"], SectionError):
        return [
            Problem(tree.location((*keys, problem.location)), problem.message, problem.remedy)
            for problem in context["error"].problems
        ]
    owner = _owner(section, keys[1:])
    if kind == "extra_forbidden":
        return [Problem(location, "unknown field", _remedy_unknown(str(keys[-1]), owner))]
    if kind == "missing":
        field = owner.model_fields.get(str(keys[-1]))  # None: an element of a list
        return [
            Problem(
                location, "is missing", f"add it: {_first_sentence(field)}" if field else "add it"
            )
        ]
    value = detail["input"]
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", context["expected"])
        return [Problem(location, f"is {value!r}", _nearest(str(value), choices, "values"))]
    if kind == "model_type":
        return [Problem(location, f"is {value!r}", "it should be a mapping of fields to values")]
    reason = detail["msg"].replace("Input should", "it should").replace("tuple", "list")
    reason = reason.removeprefix("Value error, ")
    return [Problem(location, f"is {value!r}", reason)]


def _missing_section(name: str, info: FieldInfo) -> Problem:
    fields = section_class(info).model_fields
    needed = [f"{name}.{field}" for field, about in fields.items() if about.is_required()]
    return Problem(name, "the section is missing", f"add it, with at least {', '.join(needed)}")


def section_class(info: FieldInfo) -> type[Section]:
    """The class behind a section's annotation, which may be optional."""
    found = _models_in(info.annotation)
    assert len(found) == 1 and issubclass(found[0], Section), info
    return found[0]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _owner(section: type[BaseModel], keys: Keys) -> type[BaseModel]:
    """The class that has, or should have, the field that `keys` ends in."""
    for key in keys[:-1]:
        if isinstance(key, str) and key in section.model_fields:
            section = next(iter(_models_in(section.model_fields[key].annotation)), section)
    return section


def _remedy_unknown(name: str, owner: type[BaseModel]) -> str:
    """The nearest field, or the section in which a field of that name is."""
    near = difflib.get_close_matches(name, owner.model_fields, n=1)
    homes = [
        f"{section}.{name}"
        for section, info in RunConfig.model_fields.items()
        if name in section_class(info).model_fields
    ]
    if not near and homes:
        return f"did you mean `{homes[0]}`?"
    return _nearest(name, owner.model_fields, "fields")


def _nearest(name: str, names: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean `{near[0]}`?" if near else f"the {what} are {', '.join(names)}"


def _first_sentence(field: FieldInfo) -> str:
    return (field.description or "").split(". ")[0].rstrip(".").replace("\n", " ")

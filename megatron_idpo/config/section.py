"""The base of every configuration section: frozen, typed, strict, documented by its docstrings.

A section is one class and one line in `RunConfig`. Its docstring and the strings below its fields
become `docs/configuration.md`. Values are checked strictly: `true` is not a number, nor is `"8"`.
A section that is constructed in Python raises `ConfigError` with every problem, as `load_config`
does for a file.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from megatron_idpo.config.other_names import other_name, other_value
from megatron_idpo.config.yaml_tree import Keys, dotted, shown
from megatron_idpo.errors import ConfigError, Problem

_MAX_INT = 2**31 - 1
"""Counts, positions and seeds are 32-bit numbers in one library or another."""

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Of the normal 32-bit floats, in which losses and updates are computed."""

_VARIABLE = re.compile(r"(?:^|/)\$|\$\{|\$[A-Za-z_]")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_MAX_NAME_BYTES = 255  # NAME_MAX of Linux file systems


_CHARACTERS = "use Unicode characters, without NUL and surrogates (not UTF-8?)"


def _check_int(value: int) -> int:
    if value > _MAX_INT:
        raise ValueError(f"it should be at most {_MAX_INT}")
    return value


def _check_float(value: float) -> float:
    # Outside, a learning rate would be 0 and a scale infinite once a tensor is multiplied by it.
    if value and not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"as a 32-bit number it would be {'0' if value < 1 else 'infinite'}")
    return value


def _check_characters(value: str) -> str:
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(_CHARACTERS)
    return value


def _check_path(value: str) -> str:
    if _VARIABLE.search(value):
        raise ValueError("environment variables are not replaced: write the path out")
    if not value.strip() or _CONTROL.search(value):
        raise ValueError("a path is not blank, and has no line breaks or control characters")
    if value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise ValueError("there is no such user: write the home directory out")
    if any(len(name.encode()) > _MAX_NAME_BYTES for name in value.split("/")):
        raise ValueError(f"a name in a path has at most {_MAX_NAME_BYTES} bytes")
    return value


Fp32 = AfterValidator(_check_float)
"""Every field that is a float has it."""

Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict(), Field(ge=0), AfterValidator(_check_int)]
PositiveInt = Annotated[int, Strict(), Field(gt=0), AfterValidator(_check_int)]
PositiveFloat = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), Fp32]
NonNegativeFloat = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), Fp32]
Weight = Annotated[float, Strict(), Field(ge=0, le=1), Fp32]
Fraction = Annotated[float, Strict(), Field(gt=0, lt=1), Fp32]
Text = Annotated[str, Field(min_length=1), AfterValidator(_check_characters)]
TemplateText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, or a template that is written in its place."""
PathText = Annotated[Text, AfterValidator(_check_path), AfterValidator(os.path.expanduser)]
"""A path. A leading `~` is the home directory; hub names and glob patterns are left as they are."""


def _check_not_empty[T: tuple[Any, ...]](values: T) -> T:
    if not values:
        raise ValueError("give at least one")
    return values


def _check_distinct[T: tuple[Any, ...]](values: T) -> T:
    if len(set(values)) < len(values):
        raise ValueError("give each value once")
    return values


FromPath = BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
"""A path in place of a section with the field `path`."""
NonEmpty = AfterValidator(_check_not_empty)
Distinct = AfterValidator(_check_distinct)


class Section(BaseModel):
    """A frozen group of fields that rejects unknown ones.

    Raises:
        ConfigError: on construction, with every problem. `model_validate` raises pydantic's
            `ValidationError` instead, which `describe_errors` turns into problems.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic derives from the fields

        def __init__(self, **fields: Any) -> None:
            """Validate the fields; raises ConfigError."""
            try:
                super().__init__(**fields)
            except ValidationError as error:
                keys = (section_name(type(self)),)
                raise ConfigError.of(describe_errors(error, type(self), keys)) from None

        # Without this mark pydantic would call __init__ for nested sections too, and their
        # location in the file would be lost in the ConfigError.
        __init__.__pydantic_base_init__ = True

    used_with: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """For a field that is not always used: the field that it depends on, then the values of that
    field with which it is used. Without values: any but null, 0, false and the empty list."""

    exclusive: ClassVar[tuple[str, ...]] = ()
    """Fields of which at most one may be set."""

    def problems(self) -> Iterable[Problem]:
        """Other contradictions between this section's fields; `Problem.location` is a field."""
        return ()

    @model_validator(mode="after")
    def _check_problems(self) -> Self:
        if problems := [*self.problems(), *self._unused_fields()]:
            # A caller adds where the section was written (`describe_errors`).
            raise PydanticCustomError("section", "contradictions", {"problems": problems})
        return self

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _unused_fields(self) -> Iterator[Problem]:
        """Fields that the user set and that `used_with` or `exclusive` leaves without effect."""
        for name, (needed, *values) in self.used_with.items():
            value = getattr(self, needed)
            is_used = value in values if values else bool(value)
            if not is_used and self._is_set(name):
                text = value if isinstance(value, str) else json.dumps(value)
                to = f" to {' or '.join(values)}" if values else ""
                remedy = f"set {needed}{to}, or leave it out"
                yield Problem(name, f"has no effect: {needed} is {text}", remedy)
        first, *others = [name for name in self.exclusive if getattr(self, name)] or [""]
        for name in others:
            yield Problem(name, f"has no effect: {first} is set", "keep one of them")


def describe_errors(
    error: ValidationError,
    section: type[BaseModel],
    keys: Keys = (),
    locate: Callable[[Keys], str] = dotted,
    fields_elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> list[Problem]:
    """Pydantic's errors in the words of a configuration file.

    Args:
        error: raised while `section` was validated.
        section: its class.
        keys: path of the section in the file.
        locate: the `Problem.location` of a path.
        fields_elsewhere: for a field that the section lacks: where it is, by its name.
    """
    problems = []
    for detail in error.errors():
        # pydantic appends "[key]" to the location of a mapping's key.
        path: Keys = (*keys, *(key for key in detail["loc"] if key != "[key]"))
        if detail["type"] == "section":
            inner: list[Problem] = detail["ctx"]["problems"]
            problems += [replace(item, location=locate((*path, item.location))) for item in inner]
        else:
            owner = _owner(section, path[len(keys) :])
            message, remedy = _describe(detail, path, owner, fields_elsewhere)
            problems.append(Problem(locate(path), message, remedy))
    return problems


def _describe(
    detail: Any, path: Keys, owner: type[BaseModel], fields_elsewhere: Mapping[str, str]
) -> tuple[str, str]:
    """Message and remedy for one of pydantic's errors at `path`, which ends at or in `owner`."""
    kind, value, place, name = detail["type"], detail["input"], section_name(owner), str(path[-1])
    if kind == "extra_forbidden":
        if (hint := other_name(place, name)) is not None:
            return "unknown field", hint
        if name in fields_elsewhere and nearest(name, owner.model_fields) is None:
            return "unknown field", f"did you mean {fields_elsewhere[name]}?"
        return "unknown field", suggest(name, owner.model_fields, "fields")
    if kind == "missing":
        field = owner.model_fields.get(name)  # None: an element of a list
        return "is missing", f"add it: {_first_sentence(field)}" if field else "add it"
    # Of an element of a list, the field is the list.
    fields = [key for key in path if isinstance(key, str)]
    if (hint := other_value(place, fields[-1] if fields else name, value)) is not None:
        return f"is {shown(value)}", hint
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", detail["ctx"]["expected"])
        return f"is {shown(value)}", suggest(str(value), choices, "values")
    if kind == "string_unicode":
        return f"is {shown(value)}", _CHARACTERS
    if kind == "model_type":
        return f"is {shown(value)}", "it should be a mapping of fields to values"
    reason = re.sub("^(Input|String) should", "it should", detail["msg"]).replace("tuple", "list")
    return f"is {shown(value)}", reason.removeprefix("Value error, ")


_MIN_SIMILARITY = 0.8
"""Of a typing error. Less similar names often mean something else: `tensor_parallel` is not
`sequence_parallel`, and `simpo` is not `ipo`."""


def nearest(name: str, names: Iterable[str], min_similarity: float = _MIN_SIMILARITY) -> str | None:
    """That of `names` which `name` probably is, with a typing error or in capitals."""
    known = list(names)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=min_similarity)
    # Two letters exchanged in a short name are less similar: `lroa` for `lora`.
    near += [one for one in known if sorted(one) == sorted(name.lower())]
    return near[0] if near else None


def suggest(
    name: str, names: Iterable[str], what: str, min_similarity: float = _MIN_SIMILARITY
) -> str:
    """The nearest of `names` as a remedy, or all of them."""
    names = list(names)
    near = nearest(name, names, min_similarity)
    return f"did you mean `{near}`?" if near else f"the {what} are {', '.join(names)}"


def section_name(section: type[BaseModel]) -> str:
    """`optimizer` for `OptimizerConfig`."""
    return section.__name__.removesuffix("Config").lower()


def section_class(field: FieldInfo) -> type[Section]:
    """The class behind a section's annotation, which may be optional."""
    (section,) = _models_in(field.annotation)
    assert issubclass(section, Section), field
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _owner(section: type[BaseModel], keys: Keys) -> type[BaseModel]:
    """The class that has, or should have, the field at the end of `keys`."""
    for key in keys[:-1]:
        if isinstance(key, str) and key in section.model_fields:
            section = next(iter(_models_in(section.model_fields[key].annotation)), section)
    return section


def _first_sentence(field: FieldInfo) -> str:
    return (field.description or "").split(". ")[0].rstrip(".").replace("\n", " ")

"""Reading a configuration file and `section.field=value` overrides into one tree of plain values.

The scalars are YAML 1.2's core schema, not PyYAML's YAML 1.1: `1e-4` is a number, `no` and `on` are
words, `010` is ten and `12:30` is a word. Every key remembers where it came from, a
line of the file or the command line, so that a mistake can be pointed at; a key written twice is a
mistake. What the values mean is not known here (`config.py`).
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_idpo.errors import ConfigError, Problem

Keys = tuple[str | int, ...]
"""The way to a value: `("data", "train", 0, "path")`."""

COMMAND_LINE = "command line"


@dataclass
class Tree:
    """Plain values with the place each one was written at."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    """`config.yaml:7` or `command line`, for every key that was written."""

    problems: list[Problem] = field(default_factory=list)
    """Mistakes that did not prevent reading on."""

    def location(self, keys: Keys) -> str:
        """`data.train.0.path (config.yaml:7)`: a key, and where it or its nearest parent is."""
        dotted = ".".join(map(str, keys))
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return f"{dotted} ({self.origins[keys[:length]]})"
        return dotted


class _Scalars:
    """YAML 1.2's core schema, for reading and for writing."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


class _Loader(_Scalars, yaml.SafeLoader):
    def construct_int(self, node: yaml.ScalarNode) -> int:
        """A decimal number; PyYAML would take a leading zero for octal."""
        return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(_Scalars, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out instead of referring to the first one."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape what does not print; PyYAML would write some control characters plainly."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first
        )


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The values of a YAML file, with overrides put on top.

    Args:
        path: the file; UTF-8, a mapping of sections.
        overrides: `section.field=value`, the value in YAML; `section=null` removes a section.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it is no mapping.
    """
    tree = Tree()
    node = _compose(Path(path))
    if node is not None:
        values = _Reader(Path(path).name, tree).value(node, (), ())
        if not isinstance(values, dict):
            raise ConfigError.at(
                str(path), "is not a mapping of sections", "write `model:`, `data:`, … at its top"
            )
        tree.values = values
    for override in overrides:
        problem = _apply(tree, override)
        if problem is not None:
            tree.problems.append(problem)
    return tree


def write_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read_tree` reads back unchanged."""
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return text


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError.at(str(path), "there is no such file", "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError.at(str(path), f"is not UTF-8: {error}", "save it as UTF-8") from error
    except OSError as error:
        raise ConfigError.at(str(path), f"cannot be read: {error.strerror}") from error
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        message = f"is not YAML: {_syntax(error)}"
        raise ConfigError.at(
            location, message, "check quotes, colons and indentation there"
        ) from error


def _syntax(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


class _Reader:
    """Turns YAML nodes into values and notes in the tree where each key was."""

    def __init__(self, origin: str, tree: Tree) -> None:
        self._origin = origin
        self._tree = tree

    def value(self, node: yaml.Node, keys: Keys, above: tuple[yaml.Node, ...]) -> Any:
        if any(node is parent for parent in above):
            self._complain(node, keys, "contains itself", "write the value out")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, self._note(item, (*keys, index)), (*above, node))
                for index, item in enumerate(node.value)
            ]
        try:
            return _Loader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            message = f"{node.value!r} is not a valid {node.tag.rpartition(':')[2]}"
            self._complain(node, keys, message, "leave the tag out")
            return None

    def _mapping(
        self, node: yaml.MappingNode, keys: Keys, above: tuple[yaml.Node, ...]
    ) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_node, keys, "has a key that is not a word", "use words as keys")
                continue
            key = key_node.value
            if key in values:
                first = self._tree.origins[(*keys, key)]
                message = f"was already written at {first}"
                self._complain(key_node, (*keys, key), message, "keep one of them")
                continue
            values[key] = self.value(value_node, self._note(key_node, (*keys, key)), above)
        return values

    def _note(self, node: yaml.Node, keys: Keys) -> Keys:
        self._tree.origins[keys] = self._where(node)
        return keys

    def _where(self, node: yaml.Node) -> str:
        if self._origin == COMMAND_LINE:
            return COMMAND_LINE
        return f"{self._origin}:{node.start_mark.line + 1}"

    def _complain(self, node: yaml.Node, keys: Keys, message: str, remedy: str) -> None:
        location = f"{'.'.join(map(str, keys))} ({self._where(node)})"
        self._tree.problems.append(Problem(location, message, remedy))


def _apply(tree: Tree, override: str) -> Problem | None:
    """Put one `section.field=value` into the tree; what is wrong with it, if anything."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        return Problem(COMMAND_LINE, f"{override!r} sets nothing", "write section.field=value")
    mapping = tree.values
    for depth, key in enumerate(keys[:-1], start=1):
        if mapping.get(key) is None:
            mapping[key] = {}
            tree.origins.setdefault(keys[:depth], COMMAND_LINE)
        mapping = mapping[key]
        if not isinstance(mapping, dict):
            inner = ".".join(keys[:depth])
            return Problem(
                COMMAND_LINE, f"{override!r}: {inner} has no fields", f"set all of {inner} instead"
            )
    tree.origins = {at: where for at, where in tree.origins.items() if at[: len(keys)] != keys}
    tree.origins[keys] = COMMAND_LINE
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return Problem(
            f"{name} ({COMMAND_LINE})", f"{text!r} is not YAML: {_syntax(error)}", "quote it"
        )
    value = None if node is None else _Reader(COMMAND_LINE, tree).value(node, keys, ())
    if value is None and len(keys) == 1:
        mapping.pop(keys[0], None)
    else:
        mapping[keys[-1]] = value
    return None

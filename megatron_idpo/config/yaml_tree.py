"""A configuration file and `section.field=value` overrides as one tree of plain values.

Scalars follow the core schema of YAML 1.2, not PyYAML's YAML 1.1: `1e-4` is a number, `no`, `on`
and `12:30` are strings and `010` is ten. Every key has an origin, a line of the file or the command
line, for error messages. A duplicate key is an error. Nothing here depends on the sections.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_idpo.errors import ConfigError, Problem

Keys = tuple[str | int, ...]
"""The path of a value: `("data", "train", 0, "path")`."""

COMMAND_LINE = "command line"


@dataclass
class Tree:
    """Plain values with the origin of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    """`config.yaml:7` or `command line`, by path."""

    problems: list[Problem] = field(default_factory=list)
    """Problems that did not prevent reading the rest."""

    def location(self, keys: Keys) -> str:
        """`data.train.0.path (config.yaml:7)`: a path with its origin or its nearest parent's."""
        dotted = ".".join(map(str, keys))
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return f"{dotted} ({self.origins[keys[:length]]})"
        return dotted


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """A decimal number; PyYAML would read a leading zero as octal."""
        return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values in full; PyYAML would write an alias of the first one."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape characters that do not print; PyYAML writes some control characters raw."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

# The core schema of YAML 1.2, for loader and dumper, in place of PyYAML's resolvers.
_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The values of a YAML file with overrides applied.

    Args:
        path: a UTF-8 file with a mapping of sections.
        overrides: `section.field=value`, the value in YAML; `section=null` removes a section.

    Raises:
        ConfigError: the file does not exist, is not YAML, or is not a mapping.
    """
    tree = Tree()
    node = _compose(Path(path))
    if node is not None:
        values = _Reader(Path(path).name, tree).value(node, (), ())
        if not isinstance(values, dict):
            remedy = "write `model:`, `data:`, … at the top level"
            raise ConfigError.at(str(path), "is not a mapping of sections", remedy)
        tree.values = values
    for override in overrides:
        tree.problems += list(_apply(tree, override))
    return tree


def write_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read_tree` reads back unchanged."""
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return text


def _compose(path: Path) -> yaml.Node | None:
    try:
        with ConfigError.on_os_error(str(path), "cannot be read", "check the path"):
            text = path.read_text(encoding="utf-8")
        return yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError.at(str(path), f"is not UTF-8: {error}", "save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        message = f"is not YAML: {_syntax(error)}"
        raise ConfigError.at(location, message, "check quotes, colons and indentation") from error


def _syntax(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


class _Reader:
    """Converts YAML nodes to values and records the origin of each key in the tree."""

    def __init__(self, origin: str, tree: Tree) -> None:
        self._origin = origin
        self._tree = tree

    def value(self, node: yaml.Node, keys: Keys, above: tuple[yaml.Node, ...]) -> Any:
        if any(node is parent for parent in above):
            self._report(node, keys, "contains itself", "write the value out")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, self._record(item, (*keys, index)), (*above, node))
                for index, item in enumerate(node.value)
            ]
        try:
            return _Loader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            message = f"{node.value!r} is not a valid {node.tag.rpartition(':')[2]}"
            self._report(node, keys, message, "leave the tag out")
            return None

    def _mapping(
        self, node: yaml.MappingNode, keys: Keys, above: tuple[yaml.Node, ...]
    ) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                message = "has a key that is not a string"
                self._report(key_node, keys, message, "use strings as keys")
                continue
            key = key_node.value
            inner = (*keys, key)
            if key in values:
                message = f"is a duplicate of {self._tree.origins[inner]}"
                self._report(key_node, inner, message, "keep one of them")
            else:
                values[key] = self.value(value_node, self._record(key_node, inner), above)
        return values

    def _record(self, node: yaml.Node, keys: Keys) -> Keys:
        self._tree.origins[keys] = self._origin_of(node)
        return keys

    def _origin_of(self, node: yaml.Node) -> str:
        if self._origin == COMMAND_LINE:
            return COMMAND_LINE
        return f"{self._origin}:{node.start_mark.line + 1}"

    def _report(self, node: yaml.Node, keys: Keys, message: str, remedy: str) -> None:
        location = f"{'.'.join(map(str, keys))} ({self._origin_of(node)})"
        self._tree.problems.append(Problem(location, message, remedy))


def _apply(tree: Tree, override: str) -> Iterator[Problem]:
    """Apply one override to the tree, or yield its problem."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        message = f"cannot parse override {override!r}"
        yield Problem(COMMAND_LINE, message, "expected section.field=value")
        return
    mapping = tree.values
    for depth, key in enumerate(keys[:-1], start=1):
        if mapping.get(key) is None:
            mapping[key] = {}
            tree.origins.setdefault(keys[:depth], COMMAND_LINE)
        mapping = mapping[key]
        if not isinstance(mapping, dict):
            inner = ".".join(keys[:depth])
            message = f"{override!r}: {inner} has no fields"
            yield Problem(COMMAND_LINE, message, f"set all of {inner} instead")
            return
    # The override replaces a whole subtree, also in the origins.
    below = [path for path in tree.origins if path[: len(keys)] == keys]
    for path in below:
        del tree.origins[path]
    tree.origins[keys] = COMMAND_LINE
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        location = f"{name} ({COMMAND_LINE})"
        yield Problem(location, f"{text!r} is not YAML: {_syntax(error)}", "quote it")
        return
    value = None if node is None else _Reader(COMMAND_LINE, tree).value(node, keys, ())
    if value is None and len(keys) == 1:
        mapping.pop(keys[0], None)
    else:
        mapping[keys[-1]] = value

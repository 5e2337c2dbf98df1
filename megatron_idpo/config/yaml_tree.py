"""A configuration file and `section.field=value` overrides as one tree of plain values.

Scalars follow the core schema of YAML 1.2, not PyYAML's YAML 1.1: `1e-4` is a number, `no`, `on`
and `12:30` are strings and `010` is ten. Every key has an origin, a line of the file or the command
line, for error messages. A duplicate key, a tag and a key without a value are errors. Size, nesting
and aliases are bounded, so that no file takes long to read. Nothing here depends on the sections.
"""

import re
import reprlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_idpo.errors import ConfigError, Problem

Keys = tuple[str | int, ...]
"""The path of a value: `("data", "train", 0, "path")`."""

COMMAND_LINE = "command line"

MAX_FILE_BYTES = 1 << 18
"""A configuration with a thousand sources has a third of this. PyYAML reads it in two seconds."""

MAX_DEPTH = 20
"""Of mappings and lists in each other; the deepest field of a configuration has 6."""

MAX_VALUES = 20_000
"""Aliases count as often as they are used: seven levels of ten would be ten million values."""

_MAX_SHOWN = 100
"""Characters of a value in a message."""

_GIVE_VALUE = "write a value, or null if none is meant"


class _Repr(reprlib.Repr):
    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order of writing; the base class sorts."""
        if level <= 0 and x:
            return "{...}"
        parts = [
            f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}"
            for key in islice(x, self.maxdict)
        ]
        return f"{{{', '.join(parts + ['...'] * (len(x) > self.maxdict))}}}"


_repr = _Repr(
    maxstring=_MAX_SHOWN, maxother=_MAX_SHOWN, maxlong=_MAX_SHOWN, maxlist=8, maxdict=8, maxlevel=4
)


def shown(value: object) -> str:
    """A value as it is shown in a message: on one line, shortened."""
    return _repr.repr(value)


def dotted(keys: Keys) -> str:
    """`data.train.0.path`, on one line also if a key is not printable."""
    return ".".join(
        str(key) if str(key).isprintable() and len(str(key)) <= _MAX_SHOWN else shown(str(key))
        for key in keys
    )


@dataclass
class Tree:
    """Plain values with the origin of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    """`config.yaml:7` or `command line`, by path."""

    removed: set[str] = field(default_factory=set)
    """Keys at the top level that are null, in the file or by an override; not in `values`."""

    problems: list[Problem] = field(default_factory=list)
    """Problems that did not prevent reading the rest."""

    def location(self, keys: Keys) -> str:
        """`data.train.0.path (config.yaml:7)`: a path with its origin or its nearest parent's."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return f"{dotted(keys)} ({self.origins[keys[:length]]})"
        return dotted(keys)


class _RefusedError(yaml.MarkedYAMLError):
    """Valid YAML that no configuration needs; `problem` is the message and `note` the remedy."""

    def __init__(self, message: str, mark: yaml.Mark, remedy: str) -> None:
        super().__init__(problem=message, problem_mark=mark, note=remedy)


def _too_deep(mark: yaml.Mark) -> _RefusedError:
    return _RefusedError(f"is nested more than {MAX_DEPTH} levels deep", mark, "flatten it")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node below `parent`; refuses tags, which name types, and bounds this recursion."""
        event = self.peek_event()
        if (tag := getattr(event, "tag", None)) is not None:
            name = re.sub("^tag:yaml.org,2002:", "!!", tag)
            message, remedy = f"has the tag {shown(name)[1:-1]}", "write the value without a tag"
            raise _RefusedError(message, event.start_mark, remedy)
        if self._depth > MAX_DEPTH:
            raise _too_deep(event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

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
    tree, path = Tree(), Path(path)
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = None if node is None else _Reader(path.name, tree).value(node, (), ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        if isinstance(error, _RefusedError):
            raise ConfigError.at(location, str(error.problem), str(error.note)) from None
        message = f"is not YAML: {_syntax(error)}"
        remedy = _remedy(error, "check quotes, colons and indentation")
        raise ConfigError.at(location, message, remedy) from error
    if values is not None:
        if not isinstance(values, dict):
            remedy = "write `model:`, `data:`, … at the top level"
            raise ConfigError.at(str(path), "is not a mapping of sections", remedy)
        tree.removed = {name for name, value in values.items() if value is None}
        tree.values = {name: value for name, value in values.items() if value is not None}
    for override in overrides:
        tree.problems += list(_apply(tree, override))
    return tree


def write_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read_tree` reads back unchanged."""
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return text


def _read_text(path: Path) -> str:
    with ConfigError.on_os_error(str(path), "cannot be read", "check the path"):
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        message = f"is larger than {MAX_FILE_BYTES:,} bytes"
        raise ConfigError.at(str(path), message, "name a configuration file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.at(str(path), f"is not UTF-8: {error}", "save it as UTF-8") from error


def _syntax(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


class _Reader:
    """Converts YAML nodes to values and records the origin of each key in the tree."""

    def __init__(self, origin: str, tree: Tree) -> None:
        self._origin = origin
        self._tree = tree
        self._loader = _Loader("")
        self._num_values = 0

    def value(self, node: yaml.Node, keys: Keys, above: tuple[yaml.Node, ...]) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            message = f"has more than {MAX_VALUES:,} values, counting each use of an alias"
            raise _RefusedError(message, node.start_mark, "write out what is needed")
        if any(node is parent for parent in above):
            self._report(node, keys, "contains itself", "write the value out")
            return None
        if len(above) > MAX_DEPTH:
            raise _too_deep(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, self._record(item, (*keys, index)), (*above, node))
                for index, item in enumerate(node.value)
            ]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, keys)

    def _scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        is_plain = not node.style
        if is_plain and not node.value:
            self._report(node, keys, "is empty", _GIVE_VALUE)
        try:
            return self._loader.construct_object(node)
        except ValueError:  # Python converts integers of up to 4,300 digits
            message = f"is a number of {len(node.value):,} digits"
            self._report(node, keys, message, "write a smaller one")
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
        location = f"{dotted(keys)} ({self._origin_of(node)})"
        self._tree.problems.append(Problem(location, message, remedy))


def _apply(tree: Tree, override: str) -> Iterator[Problem]:
    """Apply one override to the tree, or yield its problem."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        message = f"cannot parse override {shown(override)}"
        yield Problem(COMMAND_LINE, message, "expected section.field=value")
        return
    location = f"{dotted(keys)} ({COMMAND_LINE})"
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        yield Problem(location, *_reason(error, text))
        return
    if node is None or _lost_part(text, node):
        yield Problem(location, *_loss(text, node))
        return
    mapping = tree.values
    for depth, key in enumerate(keys[:-1], start=1):
        if mapping.get(key) is None:
            mapping[key] = {}
            tree.origins.setdefault(keys[:depth], COMMAND_LINE)
        mapping = mapping[key]
        if not isinstance(mapping, dict):
            inner = dotted(keys[:depth])
            message = f"{shown(override)}: {inner} has no fields"
            yield Problem(COMMAND_LINE, message, f"set all of {inner} instead")
            return
    # The override replaces a whole subtree, also in the origins.
    for path in [path for path in tree.origins if path[: len(keys)] == keys]:
        del tree.origins[path]
    tree.origins[keys] = COMMAND_LINE
    try:
        value = _Reader(COMMAND_LINE, tree).value(node, keys, ())
    except yaml.YAMLError as error:
        yield Problem(location, *_reason(error, text))
        return
    if value is None and len(keys) == 1:
        mapping.pop(name, None)
        tree.removed.add(name)
    else:
        mapping[keys[-1]] = value


def _reason(error: yaml.YAMLError, text: str) -> tuple[str, str]:
    """Message and remedy."""
    if isinstance(error, _RefusedError):
        return str(error.problem), str(error.note)
    return f"{shown(text)} is not YAML: {_syntax(error)}", _remedy(error, "quote it")


def _remedy(error: yaml.YAMLError, otherwise: str) -> str:
    """YAML has no place for some control characters, quoted neither."""
    return "remove that character" if isinstance(error, yaml.reader.ReaderError) else otherwise


def _lost_part(text: str, node: yaml.Node) -> str:
    """What YAML does not read of an override's value: comments and document marks."""
    return (text[: node.start_mark.index] + text[node.end_mark.index :]).strip()


def _loss(text: str, node: yaml.Node | None) -> tuple[str, str]:
    """Message and remedy for a value of which nothing or only a part would be read."""
    if node is None:
        # An unset shell variable must neither remove a section nor select a default.
        return "has no value", f"{_GIVE_VALUE} (is a shell variable unset?)"
    message = f"is {shown(text)}, of which YAML ignores {shown(_lost_part(text, node))}"
    return message, "put quotes around the value"

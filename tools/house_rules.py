"""The house rules that ruff and mypy do not know: `python tools/house_rules.py [ROOT]`.

Sizes, file names, which room may import which, where megatron-core may be touched, a test beside
every module, nothing left undone, no paths of somebody's machine. Each rule is a function from a
`Tree` to the sentences that say what breaks it; CONTRIBUTING.md gives the reasons. Documentation of
everything public is ruff's (D1), types are mypy's.
"""

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "megatron_idpo"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_EXCEPTION_LINES = 80
LONG_FUNCTIONS: dict[str, str] = {}
"""`path:function` -> why it may have up to `MAX_EXCEPTION_LINES`."""

UNTESTED_MODULES: dict[str, str] = {
    "megatron_idpo/__main__.py": "three lines; tests/test_cli.py starts it",
}
"""Module -> why it has no test file of its own."""

TIERS = (
    {"errors", "atomic", "file_lock"},
    {"objective", "mcore"},
    {"config", "checkpoint", "convert", "data", "lora", "plugin", "reference"},
    {"doctor", "evaluate", "plan", "sdpo", "train"},
    {"testing"},
    {"cli"},
    {"__main__"},
)
"""The rooms, lowest first. Imports go down or sideways, and sideways never in a circle."""

ALONE = {"objective", "mcore"}
"""Rooms that import nothing of ours but errors."""

MEGATRON_ROOMS = {"mcore", "checkpoint"}
MEGATRON_TYPES_ROOMS = {"convert", "lora", "plugin", "train"}
NAMELESS_FILES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
UNDONE = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|workspace)/\w")
TEXT_FILES = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".cfg", ".ipynb"}
SKIPPED_DIRECTORIES = {"build", "dist", "runs", "__pycache__"}


@dataclass(frozen=True)
class Import:
    """One import of a module: what, where, and whether only a type checker sees it."""

    module: str
    line: int
    types_only: bool


@dataclass(frozen=True)
class Source:
    """A Python file and what the rules ask about it."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, self.path)

    @property
    def room(self) -> str | None:
        """The room of a package file (`mcore`, `cli`, ...); None outside and for the package.

        A top-level `config_yaml.py` is part of the room `config`.
        """
        parts = Path(self.path).with_suffix("").parts
        if parts[0] != PACKAGE or parts[1] == "__init__":
            return None
        known = set().union(*TIERS)
        part_of = [room for room in known if parts[1].startswith(f"{room}_")]
        return part_of[0] if part_of and len(parts) == 2 else parts[1]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, at any depth; relative ones resolved."""
        return list(_imports(self.tree, Path(self.path).parent.parts, types_only=False))


class Tree:
    """The files of a checkout."""

    def __init__(self, root: Path) -> None:
        """Read the Python files under `root`."""
        self.root = root
        self.sources = [
            Source(str(path.relative_to(root)), path.read_text(encoding="utf-8"))
            for path in self.files()
            if path.suffix == ".py"
        ]
        self.package = [source for source in self.sources if source.path.startswith(f"{PACKAGE}/")]

    def files(self) -> Iterator[Path]:
        """Every file of ours, not what tools leave behind (hidden directories, builds)."""
        for directory, below, names in os.walk(self.root):
            below[:] = sorted(
                name
                for name in below
                if (name == ".ci" or not name.startswith("."))
                and name not in SKIPPED_DIRECTORIES
                and not name.endswith(".egg-info")
            )
            yield from (Path(directory, name) for name in sorted(names))


def _imports(node: ast.AST, package: tuple[str, ...], *, types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                yield from _imports(ast.Module([inner], []), package, types_only=True)
            for inner in child.orelse:
                yield from _imports(ast.Module([inner], []), package, types_only=types_only)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, types_only)
        elif isinstance(child, ast.ImportFrom):
            above = package[: len(package) + 1 - child.level] if child.level else ()
            base = ".".join((*above, *([child.module] if child.module else [])))
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, types_only)
        else:
            yield from _imports(child, package, types_only=types_only)


def file_sizes(tree: Tree) -> Iterator[str]:
    """A file is one concept; a long one is two."""
    for source in tree.sources:
        lines = len(source.text.splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{source.path}: {lines} lines, at most {MAX_FILE_LINES}"


def function_sizes(tree: Tree) -> Iterator[str]:
    """A function fits on a screen; its docstring is not counted."""
    for source in tree.sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = _code_lines(node)
            excused = f"{source.path}:{node.name}" in LONG_FUNCTIONS
            allowed = MAX_EXCEPTION_LINES if excused else MAX_FUNCTION_LINES
            if lines > allowed:
                where = f"{source.path}:{node.lineno}"
                yield f"{where}: {node.name} has {lines} lines, at most {allowed}"


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def file_names(tree: Tree) -> Iterator[str]:
    """A file is named for its concept."""
    for source in tree.sources:
        if Path(source.path).name in NAMELESS_FILES:
            yield f"{source.path}: name the file for what is in it"


def import_directions(tree: Tree) -> Iterator[str]:
    """Rooms import downwards; the foundation rooms import errors alone."""
    tier = {room: level for level, rooms in enumerate(TIERS) for room in rooms}
    sideways: dict[str, set[str]] = {}
    for source in tree.package:
        room = source.room
        if room is None:
            continue
        if room not in tier:
            yield f"{source.path}: room {room!r} has no place in TIERS of tools/house_rules.py"
            continue
        for found in source.imports:
            parts = found.module.split(".")
            other = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None
            if other is None or other == room or other not in tier:
                continue
            where = f"{source.path}:{found.line}"
            if room in ALONE and other != "errors":
                yield f"{where}: {room} imports {other}; it may import errors only"
            elif tier[other] > tier[room]:
                yield f"{where}: {room} imports {other}, which is above it"
            elif not found.types_only:
                sideways.setdefault(room, set()).add(other)
    for room in sorted(sideways):
        if room in _reachable(room, sideways):
            yield f"{PACKAGE}/{room}: is in a circle of imports between rooms"


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        room = waiting.pop()
        if room not in seen:
            seen.add(room)
            waiting.extend(edges.get(room, ()))
    return seen


def megatron_imports(tree: Tree) -> Iterator[str]:
    """megatron-core is touched in the seam alone, so that its changes are met in one place."""
    for source in tree.package:
        for found in source.imports:
            if found.module.split(".")[0] != "megatron" or source.room in MEGATRON_ROOMS:
                continue
            if source.room in MEGATRON_TYPES_ROOMS and found.types_only:
                continue
            yield f"{source.path}:{found.line}: imports {found.module}; go through mcore/"


def pure_objective(tree: Tree) -> Iterator[str]:
    """The objective is a function of tensors: no process groups."""
    for source in tree.package:
        if source.room == "objective":
            for found in source.imports:
                if found.module.startswith(("torch.distributed", "megatron.")):
                    yield f"{source.path}:{found.line}: imports {found.module}"


def nothing_undone(tree: Tree) -> Iterator[str]:
    """What is not written is not there, and not promised either."""
    for source in tree.sources:
        for number, line in enumerate(source.text.splitlines(), 1):
            if UNDONE.search(line):
                yield f"{source.path}:{number}: finish it or file an issue: {line.strip()}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                if "NotImplementedError" in ast.unparse(node.exc):
                    yield f"{source.path}:{node.lineno}: raises NotImplementedError"


def machine_paths(tree: Tree) -> Iterator[str]:
    """Nobody else has our directories."""
    for path in tree.files():
        name = path.relative_to(tree.root)
        if path.suffix in TEXT_FILES or name.parts[0] in ("Makefile", ".ci"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    yield f"{name}:{number}: a path of one machine: {line.strip()}"


def mirrored_tests(tree: Tree) -> Iterator[str]:
    """Each module has a test file where one looks for it.

    A module `layout_problems.py` beside `layout.py` is part of it and may be tested with it.
    """
    for source in tree.package:
        path = Path(source.path)
        if path.name == "__init__.py" or source.path in UNTESTED_MODULES:
            continue
        words = path.stem.split("_")
        wholes = ["_".join(words[:count]) for count in range(1, len(words))]
        stems = [path.stem, *(n for n in wholes if (tree.root / path.with_stem(n)).exists())]
        tests = [Path("tests", *path.parts[1:-1], f"test_{stem}.py") for stem in stems]
        if not any((tree.root / test).exists() for test in tests):
            yield f"{source.path}: has no {tests[0]}"


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    file_sizes,
    function_sizes,
    file_names,
    import_directions,
    megatron_imports,
    pure_objective,
    nothing_undone,
    machine_paths,
    mirrored_tests,
)


def main() -> int:
    """Print every breach; return 1 if there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    tree = Tree(root)
    breaches = [f"{rule.__name__}: {breach}" for rule in RULES for breach in rule(tree)]
    print("\n".join([*breaches, f"house rules: {len(breaches) or 'no'} breaches"]))
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())

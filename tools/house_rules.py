"""The house rules that ruff and mypy do not check: `python tools/house_rules.py [ROOT]`.

File and function sizes, file names, import directions and cycles, where megatron-core may be
imported, unfinished work, machine paths, plain language. Each rule is a function from a `Tree` to
messages that say what breaks it. CONTRIBUTING.md gives the reasons. Docstrings of public names are
checked by ruff (D1), types by mypy.
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

TIERS = (
    {"errors", "machine"},
    {"storage", "console"},
    {"config"},
    {"objective", "mcore"},
    {"checkpoint", "convert", "data", "figures", "lora", "plugin", "reference"},
    {"doctor", "evaluate", "megatron_lm", "plan", "sdpo", "train"},
    {"testing"},
    {"cli"},
    {"api"},
    {"__main__"},
)
"""Subpackages, lowest first. Imports go to the same tier or below; cycles are refused."""

RESTRICTED = {"objective": {"errors", "config"}, "mcore": {"errors", "machine", "config"}}
"""Subpackages that may import only these others."""

MEGATRON_PACKAGES = {"mcore", "checkpoint"}
MEGATRON_TYPES_PACKAGES = {"convert", "lora", "plugin", "train"}
VAGUE_FILE_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|workspace)/\w")
TEXT_FILES = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".cfg", ".ipynb"}
SKIPPED_DIRECTORIES = {"build", "dist", "runs", "__pycache__"}

# Words that name nothing, or that a reader has to translate first. Names are searched too, with
# underscores as spaces. docs/decisions.md and CHANGELOG.md quote old text and are not searched.
UNPLAIN_WORDS = re.compile(
    r"\b(?:told|tell(?!\()|tells|telling|beside|whoever|whatever|nobody|in vain|mend(?:s|ed|ing)?"
    r"|wish(?:es|ed)?|(?<!there )(?:is|are) no(?! (?:more|longer|other|such|need|way|limit)\b)"
    r"|of (?:its|their) own|go(?:es|ing)? on|put down|two by two"
    r"|ha(?:s|ve) not(?! (?:been|yet|begun|run|\w+ed)\b)|rooms)\b",
    re.IGNORECASE,
)
MAX_UNPLAIN_PER_1000_LINES = 0.5
PLAIN_FILES = {".py", ".md", ".yaml", ".sh"}
NOT_SEARCHED_FOR_WORDS = {"tools/house_rules.py", "docs/decisions.md", "CHANGELOG.md"}


@dataclass(frozen=True)
class Import:
    """One import statement of a module."""

    module: str
    line: int
    types_only: bool
    """Whether it is below `if TYPE_CHECKING`."""

    at_top: bool
    """Whether it runs when the module is imported (not inside a function)."""


@dataclass(frozen=True)
class Source:
    """A Python file and what the rules read from it."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, self.path)

    @property
    def subpackage(self) -> str | None:
        """`mcore`, `cli`, `errors`, ...; None outside the package and for its `__init__`."""
        parts = Path(self.path).with_suffix("").parts
        return None if parts[0] != PACKAGE or parts[1] == "__init__" else parts[1]

    @property
    def module(self) -> str:
        """The dotted name."""
        return ".".join(Path(self.path).with_suffix("").parts).removesuffix(".__init__")

    @cached_property
    def imports(self) -> list[Import]:
        """Every import at any depth, relative ones resolved."""
        package = Path(self.path).parent.parts
        return list(_imports(self.tree, package, types_only=False, at_top=True))


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
        """Every project file; hidden directories and build products are skipped."""
        for directory, below, names in os.walk(self.root):
            below[:] = sorted(
                name
                for name in below
                if (name == ".ci" or not name.startswith("."))
                and name not in SKIPPED_DIRECTORIES
                and not name.endswith(".egg-info")
            )
            yield from (Path(directory, name) for name in sorted(names))


def _imports(
    node: ast.AST, package: tuple[str, ...], *, types_only: bool, at_top: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                body = ast.Module([inner], [])
                yield from _imports(body, package, types_only=True, at_top=at_top)
            for inner in child.orelse:
                body = ast.Module([inner], [])
                yield from _imports(body, package, types_only=types_only, at_top=at_top)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, types_only, at_top)
        elif isinstance(child, ast.ImportFrom):
            above = package[: len(package) + 1 - child.level] if child.level else ()
            base = ".".join((*above, *([child.module] if child.module else [])))
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, types_only, at_top)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(
                child, package, types_only=types_only, at_top=at_top and not is_function
            )


def file_sizes(tree: Tree) -> Iterator[str]:
    """One concept per file; a long file usually holds two."""
    for source in tree.sources:
        lines = len(source.text.splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{source.path}: {lines} lines, at most {MAX_FILE_LINES}"


def function_sizes(tree: Tree) -> Iterator[str]:
    """A function fits on a screen; its docstring is not counted."""
    for source in tree.sources:
        for node in _functions(source.tree):
            lines = _code_lines(node)
            is_exception = f"{source.path}:{node.name}" in LONG_FUNCTIONS
            allowed = MAX_EXCEPTION_LINES if is_exception else MAX_FUNCTION_LINES
            if lines > allowed:
                location = f"{source.path}:{node.lineno}"
                yield f"{location}: {node.name} has {lines} lines, at most {allowed}"


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions; expressions, which are most of a tree, contain none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if not isinstance(child, ast.expr):
            yield from _functions(child)


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def file_names(tree: Tree) -> Iterator[str]:
    """A file is named for its concept."""
    for source in tree.sources:
        if Path(source.path).name in VAGUE_FILE_NAMES:
            yield f"{source.path}: name the file for its content"


def import_directions(tree: Tree) -> Iterator[str]:
    """Subpackages import from their own tier or below, without cycles between them."""
    tier = {name: level for level, names in enumerate(TIERS) for name in names}
    edges: dict[str, set[str]] = {}
    for source in tree.package:
        own = source.subpackage
        if own is None:
            continue
        if own not in tier:
            yield f"{source.path}: subpackage {own!r} is not listed in TIERS of house_rules.py"
            continue
        for imported in source.imports:
            parts = imported.module.split(".")
            other = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None
            if other is None or other == own or other not in tier:
                continue
            location = f"{source.path}:{imported.line}"
            if own in RESTRICTED and other not in RESTRICTED[own]:
                allowed = " and ".join(sorted(RESTRICTED[own]))
                yield f"{location}: {own} imports {other}; it may import only {allowed}"
            elif tier[other] > tier[own]:
                yield f"{location}: {own} imports {other}, which is in a higher tier"
            else:
                edges.setdefault(own, set()).add(other)
    for name in sorted(edges):
        if name in _reachable(name, edges):
            yield f"{PACKAGE}/{name}: takes part in an import cycle between subpackages"


def import_cycles(tree: Tree) -> Iterator[str]:
    """No module imports itself through others, also not behind `TYPE_CHECKING`."""
    modules = {source.module: source for source in tree.package}
    edges = {
        name: {
            target
            for imported in source.imports
            if imported.at_top
            for target in (imported.module, imported.module.rpartition(".")[0])
            if target in modules
            and target != name
            # Importing a.b.c runs a/__init__ and a/b/__init__: those edges are not the author's.
            and not name.startswith(f"{target}.")
        }
        for name, source in modules.items()
    }
    for name in sorted(edges):
        if name in _reachable(name, edges):
            yield f"{modules[name].path}: takes part in an import cycle"


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(edges.get(name, ()))
    return seen


def megatron_imports(tree: Tree) -> Iterator[str]:
    """megatron-core is imported in few places, so that a new release is adapted to there."""
    for source in tree.package:
        for imported in source.imports:
            is_megatron = imported.module.split(".")[0] == "megatron"
            if not is_megatron or source.subpackage in MEGATRON_PACKAGES:
                continue
            if source.subpackage in MEGATRON_TYPES_PACKAGES and imported.types_only:
                continue
            yield f"{source.path}:{imported.line}: imports {imported.module}; go through mcore/"


def pure_objective(tree: Tree) -> Iterator[str]:
    """The objective consists of functions of tensors, without process groups."""
    for source in tree.package:
        if source.subpackage == "objective":
            for imported in source.imports:
                if imported.module.startswith(("torch.distributed", "megatron.")):
                    yield f"{source.path}:{imported.line}: imports {imported.module}"


def nothing_unfinished(tree: Tree) -> Iterator[str]:
    """What is not written is neither stubbed nor promised."""
    for source in tree.sources:
        for line_number, line in enumerate(source.text.splitlines(), 1):
            if UNFINISHED.search(line):
                yield f"{source.path}:{line_number}: finish it or file an issue: {line.strip()}"
        if "NotImplementedError" not in source.text:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                if "NotImplementedError" in ast.unparse(node.exc):
                    yield f"{source.path}:{node.lineno}: raises NotImplementedError"


def machine_paths(tree: Tree) -> Iterator[str]:
    """No absolute paths of the author's machine."""
    for path in tree.files():
        name = path.relative_to(tree.root)
        if path.suffix in TEXT_FILES or name.parts[0] in ("Makefile", ".ci"):
            for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    yield f"{name}:{line_number}: a path of one machine: {line.strip()}"


def plain_language(tree: Tree) -> Iterator[str]:
    """The field's terms in short sentences; reported when unplain words are no longer rare."""
    num_lines, hits = 0, []
    for path in tree.files():
        name = str(path.relative_to(tree.root))
        if path.suffix not in PLAIN_FILES or name in NOT_SEARCHED_FOR_WORDS:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        num_lines += len(lines)
        hits += [
            f"{name}:{line_number}: {match.group()!r}; say it plainly: {line.strip()}"
            for line_number, line in enumerate(lines, 1)
            for match in UNPLAIN_WORDS.finditer(line.replace("_", " "))
        ]
    if len(hits) > MAX_UNPLAIN_PER_1000_LINES * num_lines / 1000:
        yield from hits


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    file_sizes,
    function_sizes,
    file_names,
    import_directions,
    import_cycles,
    megatron_imports,
    pure_objective,
    nothing_unfinished,
    machine_paths,
    plain_language,
)


def main() -> int:
    """Print every violation; return 1 if there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    tree = Tree(root)
    violations = [f"{rule.__name__}: {violation}" for rule in RULES for violation in rule(tree)]
    print("\n".join([*violations, f"house rules: {len(violations) or 'no'} violations"]))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

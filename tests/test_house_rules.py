"""The checkout satisfies the house rules, and each rule detects what it is meant to detect."""

import gc
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _load_rules() -> Any:
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "tools" / "house_rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house_rules"] = module
    spec.loader.exec_module(module)
    return module


rules = _load_rules()


@pytest.fixture(scope="module")
def checkout() -> Any:
    """Parsed without garbage collection, which would traverse the growing trees again and again."""
    gc.disable()
    try:
        tree = rules.Tree(ROOT)
        assert all(source.tree for source in tree.sources)
    finally:
        gc.enable()
    return tree


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_satisfies(rule: Callable[[Any], Any], checkout: Any) -> None:
    violations = list(rule(checkout))
    assert not violations, "\n".join(violations)


def test_exceptions_name_existing_files(checkout: Any) -> None:
    paths = {source.path for source in checkout.sources}
    assert {name.rpartition(":")[0] for name in rules.LONG_FUNCTIONS} <= paths


# A rule, a file that violates it, its text, and a part of the expected message.
LONG_FILE = "x = 1\n" * 401
LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
VIOLATIONS = [
    ("file_sizes", "megatron_idpo/mcore/a.py", LONG_FILE, "401 lines"),
    ("function_sizes", "tools/a.py", LONG_FUNCTION, "long has 61 lines"),
    ("function_sizes", "tools/a.py", LONG_FUNCTION.replace("def", "async def"), "61 lines"),
    ("file_names", "megatron_idpo/mcore/utils.py", "", "name the file"),
    ("import_directions", "megatron_idpo/mcore/a.py", "import megatron_idpo.data.b", "may import"),
    ("import_directions", "megatron_idpo/objective/a.py", "from ..mcore import b", "may import"),
    (
        "import_directions",
        "megatron_idpo/data/a.py",
        "from megatron_idpo import cli",
        "higher tier",
    ),
    (
        "import_directions",
        "megatron_idpo/plugin/a.py",
        "def f():\n    from megatron_idpo.train.loop import g",
        "higher tier",
    ),
    ("import_directions", "megatron_idpo/config/b.py", "import megatron_idpo.plan.a", "higher"),
    ("import_directions", "megatron_idpo/attic/a.py", "", "not listed in TIERS"),
    ("megatron_imports", "megatron_idpo/data/a.py", "import megatron.core", "go through mcore"),
    ("megatron_imports", "megatron_idpo/train/a.py", "from megatron.core import b", "go through"),
    ("pure_objective", "megatron_idpo/objective/a.py", "import torch.distributed as d", "distrib"),
    ("nothing_unfinished", "tools/a.py", "# TO" + "DO: later", "finish it"),
    ("nothing_unfinished", "tools/a.py", "def f():\n    raise NotImplementedError('no')", "raises"),
    ("machine_paths", "docs/a.md", "see /ho" + "me/me/x", "one machine"),
    ("machine_paths", ".ci/run", "cd /wo" + "rk/main", "one machine"),
    ("machine_paths", "Makefile", "X = /ro" + "ot/x", "one machine"),
    ("plain_language", "tools/a.py", "# what is to" + "ld", "say it plainly"),
    ("plain_language", "tools/a.py", "def what_is_to" + "ld(): ...", "say it plainly"),
    ("plain_language", "docs/a.md", "A loss is n" + "o number.", "say it plainly"),
]


def _tree(root: Path, **files: str) -> Any:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return rules.Tree(root)


@pytest.mark.parametrize(("rule", "path", "text", "message"), VIOLATIONS)
def test_violation_is_reported(
    tmp_path: Path, rule: str, path: str, text: str, message: str
) -> None:
    (violation,) = getattr(rules, rule)(_tree(tmp_path, **{path: text}))
    assert violation.startswith(path)
    assert message in violation


def test_cycle_between_subpackages_is_reported(tmp_path: Path) -> None:
    tree = _tree(
        tmp_path,
        **{
            "megatron_idpo/data/a.py": "import megatron_idpo.plugin.a",
            "megatron_idpo/plugin/a.py": "import megatron_idpo.data.a",
            "megatron_idpo/convert/a.py": "import megatron_idpo.data.a",
        },
    )
    message = list(rules.import_directions(tree))
    assert [line.split(":")[0] for line in message] == [
        "megatron_idpo/data",
        "megatron_idpo/plugin",
    ]


def test_cycle_between_modules_is_reported_also_behind_type_checking(tmp_path: Path) -> None:
    tree = _tree(
        tmp_path,
        **{
            "megatron_idpo/data/a.py": "from megatron_idpo.data.b import x",
            "megatron_idpo/data/b.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from megatron_idpo.data.a import y\n"
            ),
            "megatron_idpo/data/c.py": "def f():\n    from megatron_idpo.data.c import z\n",
        },
    )
    violations = list(rules.import_cycles(tree))
    assert [line.split(":")[0] for line in violations] == [
        "megatron_idpo/data/a.py",
        "megatron_idpo/data/b.py",
    ]


ALLOWED = {
    "megatron_idpo/__init__.py": "",
    "megatron_idpo/mcore/a.py": "import megatron.core\nfrom megatron_idpo.errors import UserError",
    "megatron_idpo/mcore/a_b.py": "from .a import c",
    "megatron_idpo/plugin/a.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from megatron.core import x\n"
        "from megatron_idpo.mcore import a\n"
    ),
    "megatron_idpo/cli/main.py": "def f():\n    import megatron_idpo.doctor",
    "tools/a.py": "def f():\n    '''Doc.\n" + "    more\n" * 60 + "    '''\n    x = 1\n",
    "tests/mcore/test_a.py": "",
    "tests/plugin/test_a.py": "",
    "tests/test_cli.py": "",
    "docs/a.md": "https://example.com/home/x, ~/work/x, ../shared/x",
    ".venv/a.py": LONG_FILE,
    "megatron_idpo.egg-info/a.py": LONG_FILE,
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_allowed_code_passes(tmp_path: Path, rule: Callable[[Any], Any]) -> None:
    assert list(rule(_tree(tmp_path, **ALLOWED))) == []


def test_program_prints_violations_and_fails(tmp_path: Path) -> None:
    _tree(tmp_path, **{"tools/utils.py": ""})
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "house_rules.py"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stdout.startswith("file_names: tools/utils.py")


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import megatron_idpo\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded - {*sys.stdlib_module_names, 'megatron_idpo'}))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("[]\n", "")


def test_ruff_checks_docstrings_of_public_names() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "D1" in lint["select"]
    excused = {path for path, codes in lint["per-file-ignores"].items() if "D1" in codes}
    assert excused == {"tests/**"}

"""The house rules hold here, and each of them notices what it is there to notice."""

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
    return rules.Tree(ROOT)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps(rule: Callable[[Any], Any], checkout: Any) -> None:
    breaches = list(rule(checkout))
    assert not breaches, "\n".join(breaches)


def test_exceptions_are_about_files_that_exist_and_need_them(checkout: Any) -> None:
    paths = {source.path for source in checkout.sources}
    assert set(rules.UNTESTED_MODULES) <= paths
    assert {name.rpartition(":")[0] for name in rules.LONG_FUNCTIONS} <= paths


# What breaks a rule: the rule, a file, its text, and a word of what must be said.
LONG_FILE = "x = 1\n" * 401
LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
BREACHES = [
    ("file_sizes", "megatron_idpo/mcore/a.py", LONG_FILE, "401 lines"),
    ("function_sizes", "tools/a.py", LONG_FUNCTION, "long has 61 lines"),
    ("function_sizes", "tools/a.py", LONG_FUNCTION.replace("def", "async def"), "61 lines"),
    ("file_names", "megatron_idpo/mcore/utils.py", "", "name the file"),
    ("import_directions", "megatron_idpo/mcore/a.py", "import megatron_idpo.data.b", "errors only"),
    ("import_directions", "megatron_idpo/objective/a.py", "from ..mcore import b", "errors only"),
    ("import_directions", "megatron_idpo/data/a.py", "from megatron_idpo import cli", "above"),
    (
        "import_directions",
        "megatron_idpo/plugin/a.py",
        "def f():\n    from megatron_idpo.train.loop import g",
        "above",
    ),
    ("import_directions", "megatron_idpo/config_b.py", "import megatron_idpo.plan.a", "above"),
    ("import_directions", "megatron_idpo/attic/a.py", "", "no place in TIERS"),
    ("megatron_imports", "megatron_idpo/data/a.py", "import megatron.core", "go through mcore"),
    ("megatron_imports", "megatron_idpo/train/a.py", "from megatron.core import b", "go through"),
    ("pure_objective", "megatron_idpo/objective/a.py", "import torch.distributed as d", "distrib"),
    ("nothing_undone", "tools/a.py", "# TO" + "DO: later", "finish it"),
    ("nothing_undone", "tools/a.py", "def f():\n    raise NotImplementedError('no')", "raises"),
    ("machine_paths", "docs/a.md", "see /ho" + "me/me/x", "one machine"),
    ("machine_paths", ".ci/run", "cd /wo" + "rk/main", "one machine"),
    ("machine_paths", "Makefile", "X = /ro" + "ot/x", "one machine"),
    ("mirrored_tests", "megatron_idpo/mcore/a.py", "", "tests/mcore/test_a.py"),
    ("mirrored_tests", "megatron_idpo/a.py", "", "tests/test_a.py"),
    ("mirrored_tests", "megatron_idpo/mcore/a_b.py", "", "tests/mcore/test_a_b.py"),
]


def _tree(root: Path, **files: str) -> Any:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return rules.Tree(root)


@pytest.mark.parametrize(("rule", "path", "text", "message"), BREACHES)
def test_a_breach_is_noticed(tmp_path: Path, rule: str, path: str, text: str, message: str) -> None:
    (breach,) = getattr(rules, rule)(_tree(tmp_path, **{path: text}))
    assert breach.startswith(path)
    assert message in breach


def test_a_circle_of_rooms_is_noticed(tmp_path: Path) -> None:
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
def test_what_is_allowed_is_left_alone(tmp_path: Path, rule: Callable[[Any], Any]) -> None:
    assert list(rule(_tree(tmp_path, **ALLOWED))) == []


def test_the_program_tells_and_fails(tmp_path: Path) -> None:
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
        "print(sorted(n for n in set(sys.modules) - before if not n.startswith('megatron_idpo')))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("[]\n", "")


def test_documentation_of_everything_public_is_ruffs_to_check() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "D1" in lint["select"]
    excused = {path for path, codes in lint["per-file-ignores"].items() if "D1" in codes}
    assert excused == {"tests/**"}

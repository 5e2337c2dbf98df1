"""`tools/setup.sh` with fake Pythons: choice of the Python, messages, repeated and failed set-ups.

The fakes are shell scripts; no network, no real installation.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "tools" / "setup.sh"
# The programs that the script needs. Nothing else is on PATH, so no real Python can be found.
TOOLS = "bash sh env awk cat cksum cp dirname mkdir rm tail tee touch".split()


class Machine:
    """A machine whose only Pythons are those a test adds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.pyenv = root / "pyenv"
        tools = root / "usr"
        tools.mkdir()
        for name in TOOLS:
            program = shutil.which(name)
            assert program is not None, f"{name} is not on PATH"
            (tools / name).symlink_to(program)
        self.env = {"HOME": str(root), "PATH": f"{self.bin}:{tools}"}

    def script(self, path: Path, body: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def python(self, path: Path, minor: int, state: str = "usable") -> Path:
        """A fake interpreter that prints the probe's line for Python 3.`minor`."""
        return self.script(path, f'echo "3 {minor} {state} {path}"')

    def broken_shim(self, name: str) -> Path:
        """A pyenv shim of a version that is not selected."""
        return self.script(
            self.bin / name, f'echo "pyenv: {name}: command not found" >&2; exit 127'
        )

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.env | settings,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )

    def find(self, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(SETUP), "--find-only", **settings)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_python_on_path_is_used(machine: Machine) -> None:
    python = machine.python(machine.bin / "python3", 12)
    found = machine.find()
    assert (found.returncode, found.stdout) == (0, f"{python}\n")
    assert "Python 3.12 on PATH" in found.stderr


def test_lowest_sufficient_version_is_preferred(machine: Machine) -> None:
    machine.python(machine.bin / "python3.14", 14)
    assert machine.find().stdout.endswith("/python3.14\n")
    assert "C++ compiler" in machine.find().stderr
    machine.python(machine.bin / "python3.13", 13)
    assert machine.find().stdout.endswith("/python3.13\n")
    kept = machine.python(machine.pyenv / "versions/3.12.1/bin/python", 12)
    assert machine.find(PYENV_ROOT=str(machine.pyenv)).stdout == f"{kept}\n"


def test_pyenv_installation_is_used_if_its_shim_is_broken(machine: Machine) -> None:
    machine.broken_shim("python3.12")
    machine.python(machine.bin / "python3", 11)
    machine.python(machine.pyenv / "versions/3.11.7/bin/python", 11)
    behind = machine.python(machine.pyenv / "versions/3.12.1/bin/python", 12)
    found = machine.find(PYENV_ROOT=str(machine.pyenv))
    assert found.stdout == f"{behind}\n"
    assert "pyenv installation" in found.stderr


def test_default_pyenv_directory_needs_no_pyenv_root(machine: Machine) -> None:
    default = Path(machine.env["HOME"]) / ".pyenv/versions/3.13.0/bin/python"
    assert machine.find().returncode != 0
    machine.python(default, 13)
    assert machine.find().stdout == f"{default}\n"


def test_working_python_after_a_broken_one_on_path_is_used(machine: Machine) -> None:
    machine.broken_shim("python3.12")
    live = machine.python(machine.bin.parent / "second" / "python3.12", 12)
    found = machine.find(PATH=f"{machine.env['PATH']}:{live.parent}")
    assert found.stdout == f"{live}\n"


def test_python_managed_by_uv_is_used(machine: Machine) -> None:
    managed = machine.python(machine.bin.parent / "uv-managed" / "python3.12", 12)
    machine.script(machine.bin / "uv", f'test "$1 $2" = "python find" && echo {managed}')
    found = machine.find()
    assert found.stdout == f"{managed}\n"
    assert "found by uv" in found.stderr


def test_without_a_suitable_python_the_rejected_ones_and_remedies_are_listed(
    machine: Machine,
) -> None:
    machine.broken_shim("python3.12")
    machine.python(machine.bin / "python3", 11)
    machine.script(machine.bin / "python", 'echo "2 7 usable /somewhere/python2.7"')
    found = machine.find()
    assert (found.returncode, found.stdout) == (1, "")
    assert "python3.12 (on PATH): does not run" in found.stderr
    assert "python3 (on PATH): is Python 3.11" in found.stderr
    assert "is Python 2.7" in found.stderr
    for remedy in ("apt install", "pyenv install 3.12", "uv python install 3.12", "PYTHON="):
        assert remedy in found.stderr


def test_python_without_venv_module_is_rejected_with_a_remedy(machine: Machine) -> None:
    machine.python(machine.bin / "python3.12", 12, state="no-venv")
    found = machine.find()
    assert found.returncode == 1
    assert "sudo apt install python3.12-venv" in found.stderr
    whole = machine.python(machine.bin / "python3.13", 13)
    assert machine.find().stdout == f"{whole}\n"


@pytest.mark.parametrize("build", ["pypy", "free-threaded"])
def test_builds_without_torch_wheels_are_rejected(machine: Machine, build: str) -> None:
    machine.python(machine.bin / "python3.12", 12, state=build)
    found = machine.find()
    assert found.returncode == 1
    assert f"is a {build} build" in found.stderr


def test_python_variable_has_priority(machine: Machine) -> None:
    machine.python(machine.bin / "python3.12", 12)
    named = machine.python(machine.bin.parent / "mine", 13)
    found = machine.find(PYTHON=str(named))
    assert found.stdout == f"{named}\n"
    assert "named by PYTHON" in found.stderr


def test_too_old_python_variable_is_an_error(machine: Machine) -> None:
    machine.python(machine.bin / "python3.12", 12)
    old = machine.python(machine.bin.parent / "old", 11)
    found = machine.find(PYTHON=str(old))
    assert (found.returncode, found.stdout) == (1, "")
    assert f"PYTHON={old} cannot be used" in found.stderr
    assert "is Python 3.11" in found.stderr


def test_probe_works_on_a_real_python(machine: Machine) -> None:
    """Elsewhere fakes print the probe's line."""
    found = machine.find(PYTHON=sys.executable)
    assert found.returncode == 0, found.stderr
    version = subprocess.run(
        [found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2] >= (3, 12))"],
        capture_output=True,
        text=True,
    )
    assert version.stdout == "True\n"


def test_unknown_argument_is_an_error() -> None:
    process = subprocess.run([str(SETUP), "--fnid"], capture_output=True, text=True)
    assert process.returncode == 1
    assert "--find-only" in process.stderr


class Checkout:
    """The script, a pyproject.toml, and a fake Python that creates fake environments."""

    # The interpreter, which copies itself into the environments that it creates.
    FAKE = """
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
    "-m pip "*)
        echo "$*" >>"$HOME/pip.log"
        echo "Downloading torch-2.14.1.whl (830.6 MB)"
        echo "Installing collected packages: a, b"
        test ! -e "$HOME/no-network" ;;
    --version) echo "Python 3.12.1" ;;
    "-c import tomllib"*) echo "torch>=2.11.0a0" ;;
    "-E -c "*) echo "3 12 usable $0" ;;
esac"""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.script(machine.bin / "python3", self.FAKE)
        self.root = machine.root / "checkout"
        self.venv = self.root / ".venv"
        self.marker = self.venv / "marker"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(SETUP, self.root / "tools")
        shutil.copy(ROOT / "pyproject.toml", self.root)

    def set_up(self, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run(str(self.root / "tools" / "setup.sh"), **settings)

    def pip_calls(self) -> list[str]:
        log = self.machine.root / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(machine: Machine) -> Checkout:
    return Checkout(machine)


def test_second_call_does_nothing(checkout: Checkout) -> None:
    first = checkout.set_up()
    assert first.returncode == 0, first.stderr
    assert "torch-2.14.1.whl (830.6 MB)" in first.stderr
    assert "installing 2 packages" in first.stderr
    assert len(checkout.pip_calls()) == 1
    second = checkout.set_up()
    assert (second.returncode, second.stderr) == (0, "")
    assert len(checkout.pip_calls()) == 1


def test_changed_requirements_are_installed_into_the_existing_environment(
    checkout: Checkout,
) -> None:
    checkout.set_up()
    checkout.marker.touch()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert checkout.set_up().returncode == 0
    assert len(checkout.pip_calls()) == 2
    assert checkout.marker.exists()


def test_moved_checkout_is_installed_again(checkout: Checkout) -> None:
    """An editable installation refers to the old path."""
    checkout.set_up()
    checkout.root = checkout.root.rename(checkout.machine.root / "moved")
    assert checkout.set_up().returncode == 0
    assert len(checkout.pip_calls()) == 2


def test_interrupted_set_up_starts_over(checkout: Checkout) -> None:
    no_network = checkout.machine.root / "no-network"
    no_network.touch()
    failed = checkout.set_up()
    assert failed.returncode == 1
    assert "set-up.log" in failed.stderr
    checkout.marker.touch()
    no_network.unlink()
    assert checkout.set_up().returncode == 0
    assert not checkout.marker.exists()
    assert checkout.set_up().stderr == ""


def test_environment_without_its_python_is_created_again(checkout: Checkout) -> None:
    checkout.set_up()
    (checkout.venv / "bin" / "python").unlink()
    assert checkout.set_up().returncode == 0
    assert (checkout.venv / "bin" / "python").exists()
    assert len(checkout.pip_calls()) == 2


def test_existing_environment_is_kept_and_completed(checkout: Checkout) -> None:
    checkout.machine.run(str(checkout.machine.bin / "python3"), "-m", "venv", str(checkout.venv))
    checkout.marker.touch()
    assert checkout.set_up().returncode == 0
    assert checkout.marker.exists()
    assert len(checkout.pip_calls()) == 1


def test_directory_that_is_not_an_environment_is_never_removed(checkout: Checkout) -> None:
    checkout.marker.parent.mkdir()
    checkout.marker.touch()
    process = checkout.set_up()
    assert process.returncode == 1
    assert "is not a virtual environment" in process.stderr
    assert checkout.marker.exists()


def test_torch_index_url_is_used_for_torch_only(checkout: Checkout) -> None:
    assert checkout.set_up(TORCH_INDEX_URL="https://wheels.example/cpu").returncode == 0
    torch, rest = checkout.pip_calls()
    assert "--index-url https://wheels.example/cpu torch>=2.11.0a0" in torch
    assert "wheels.example" not in rest
    assert rest.endswith("--editable .[dev,quickstart]")

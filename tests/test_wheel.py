"""The wheel: what it contains, and that it works outside a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .train.tiny_run import write_files

ROOT = Path(__file__).parents[1]
SOURCES = ("megatron_idpo", "examples", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools.build_meta import build_wheel; print(build_wheel({directory!r}))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, because setuptools writes next to them."""
    copy, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-c", BUILD.format(directory=str(built))]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = built.glob("*.whl")
    return file


def test_wheel_has_templates_examples_and_the_quickstart_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "megatron_idpo"
    expected = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "examples" not in path.parts
    }
    expected |= {
        f"megatron_idpo/{path.relative_to(ROOT)}"
        for path in (ROOT / "examples").rglob("*")
        if path.suffix in (".yaml", ".md", ".jsonl")
    }
    assert "megatron_idpo/examples/data/quickstart_train.jsonl" in expected
    assert expected - names == set()
    foreign = {name for name in names if not name.startswith("megatron_idpo")}
    assert not foreign, "nothing else is installed"


@pytest.mark.exhaustive  # that the files are there: the test above
def test_wheel_installs_and_trains_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    target, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    files = write_files(tmp_path / "files")
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONWARNINGS": "ignore"}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "megatron_idpo", *words]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import megatron_idpo; print(megatron_idpo.__file__)"]
    found = subprocess.check_output(where, cwd=here, env=environment, text=True)
    assert found.startswith(str(target))
    assert "wrote idpo.yaml; set model.path" in run("init", "lora", "idpo.yaml")
    run("init", "quickstart", "quickstart.yaml")
    assert (here / "quickstart_data" / "quickstart_train.jsonl").is_file()
    small = [f"model.path={files.model}", f"data.train={files.train}", "model.dtype=fp32"]
    small += ["data.row_tokens=128", "data.max_length=96", "training.global_batch_pairs=4"]
    assert "Valid." in run("doctor", "idpo.yaml", *small)
    run("train", "idpo.yaml", *small, "training.max_steps=2", "data.eval_fraction=0.2")
    assert (here / "runs" / "idpo" / "adapter" / "adapter_model.safetensors").is_file()

"""The container's constraints pin every requirement but torch, and its recipe fits the repository.

Without Docker the image cannot be built here.
"""

import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch/container/Dockerfile"
FROM_THE_CONTAINER = {"torch"}
CONTAINER_TORCH = "2.11.0a0+a6c236b.nv26.02"
"""A version as NVIDIA's builds have it: before the release that it is counted as."""


def test_constraints_pin_every_requirement_in_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}
    lines = (ROOT / "launch/container/constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name for pin in pinned} == required.keys() - FROM_THE_CONTAINER
    for pin in pinned:
        ((operator, version),) = [(s.operator, s.version) for s in pin.specifier]
        assert operator == "==" and required[pin.name].specifier.contains(version), pin


def test_torch_of_a_container_satisfies_the_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    assert torch.specifier.contains(CONTAINER_TORCH, prereleases=True)  # as the doctor asks
    assert torch.specifier.contains(CONTAINER_TORCH)  # as pip does
    assert not torch.specifier.contains("2.10.0")


def test_recipe_copies_what_exists_and_its_commands_are_shell():
    instructions = DOCKERFILE.read_text().replace("\\\n", "").splitlines()
    copies = [line.split()[1:-1] for line in instructions if line.startswith("COPY ")]
    sources = [source for copy in copies for source in copy]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} <= set((ROOT / ".dockerignore").read_text().split())
    # What the wheel is built from is copied: pyproject.toml names these files.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= set(sources)
    commands = [line.removeprefix("RUN ") for line in instructions if line.startswith("RUN ")]
    assert commands
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)

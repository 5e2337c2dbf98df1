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


def test_constraints_pin_every_requirement_in_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}
    lines = (ROOT / "launch/container/constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name for pin in pinned} == required.keys() - FROM_THE_CONTAINER
    for pin in pinned:
        ((operator, version),) = [(s.operator, s.version) for s in pin.specifier]
        assert operator == "==" and required[pin.name].specifier.contains(version), pin


def test_recipe_copies_what_exists_and_its_commands_are_shell():
    instructions = DOCKERFILE.read_text().replace("\\\n", "").splitlines()
    copies = [line.split()[1:-1] for line in instructions if line.startswith("COPY ")]
    sources = [source for copy in copies for source in copy]
    assert sources and all((ROOT / source).exists() for source in sources)
    # What the wheel is built from is copied: pyproject.toml names these files.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= set(sources)
    commands = [line.removeprefix("RUN ") for line in instructions if line.startswith("RUN ")]
    assert commands
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)

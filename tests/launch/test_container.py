"""The container's constraints pin every requirement but torch, within the tested range."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
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

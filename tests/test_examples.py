"""Every configuration under examples/ is a valid one."""

from pathlib import Path

import pytest

from megatron_idpo.config import SECTIONS, load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
FOUND = sorted(EXAMPLES.rglob("*.y*ml"))


def test_there_are_examples() -> None:
    assert FOUND


@pytest.mark.parametrize("path", FOUND, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    load_config(path, optional=SECTIONS)

"""`docs/how_it_works.md` lists what `plugin/refusals.py` refuses, all of it and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.plugin import compatibility as refusals

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.md"


class EverythingOn:
    """A configuration in which every setting, whatever its name, is as unwelcome as can be."""

    recompute_granularity = "full"
    recompute_method = "uniform"

    def __getattr__(self, name: str) -> Any:
        return 2


def _rows() -> list[str]:
    """The table's rows."""
    (section,) = re.findall(r"^## What is refused\n(.*?)^## ", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^\| `.*$", section, re.M)


def _refused() -> set[str]:
    config = EverythingOn()
    problems = [
        *refusals.refused_settings(config),
        *refusals.refused_recompute(config, [1], [[1, 2]]),
    ]
    return {problem.location.removeprefix("TransformerConfig.") for problem in problems}


@pytest.mark.parametrize("name", refusals._MUST_BE_OFF)
def test_what_must_be_off_is_listed_with_its_reason(name):
    assert f"| `{name}` | {refusals._MUST_BE_OFF[name]} |" in _rows()


def test_the_table_names_what_is_refused():
    listed = {name for row in _rows() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    values = {"none", "uniform", "full"}
    assert listed - values == _refused()

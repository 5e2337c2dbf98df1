"""Loading configurations that tests write as Python values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.errors import ConfigError


def load(
    tmp_path: Path, overrides: Sequence[str] = (), required: Sequence[str] = (), **sections: Any
) -> RunConfig:
    """The configuration of these sections."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_config(path, overrides, required=required, optional=SECTIONS)


def problems_of(
    tmp_path: Path, overrides: Sequence[str] = (), required: Sequence[str] = (), **sections: Any
) -> list[str]:
    """The problems that loading these sections reports."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, overrides, required, **sections)
    return [str(problem) for problem in error.value.problems]

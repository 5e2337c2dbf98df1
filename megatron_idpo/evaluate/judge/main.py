"""The verb `judge`: who wins, compared two by two.

    megatron-idpo judge CONFIG.yaml [judge.max_prompts=40 ...]

Which answers are compared is looked at before the judge is.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import load_config
from megatron_idpo.errors import ConfigError

REQUIRED = ("judge",)
OPTIONAL = ("evaluate", "training")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Judge; returns the exit code.

    Raises:
        UserError: nothing could be judged, or too little of it; what was judged is kept.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if config.judge is None:
        raise ConfigError.at("judge", "is missing", "add it: judge.model names who judges")
    from megatron_idpo.evaluate.judge.run import judge

    return judge(config, config.judge, os.environ)

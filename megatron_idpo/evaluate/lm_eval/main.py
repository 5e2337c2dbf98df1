"""The verb `h4`: what its configuration has to say."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import load_config
from megatron_idpo.evaluate.models import evaluation_directory, subjects

REQUIRED = ("model",)
OPTIONAL = ("training", "evaluate", "h4")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Measure; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    from megatron_idpo.evaluate.lm_eval.run import h4  # torch and lm-eval: after the checks

    return h4(config, subjects(config), evaluation_directory(config))

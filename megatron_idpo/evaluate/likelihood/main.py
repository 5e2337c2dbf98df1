"""The verb `likelihood`: checks of its configuration."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.load import load_config
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.models import eval_models, evaluation_output

REQUIRED = ("model", "data")
OPTIONAL = ("objective", "lora", "layout", "training", "evaluate")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Compute the curves; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if not config.data.holds_out:
        remedy = "name files in data.eval, or set data.eval_fraction as in training"
        raise ConfigError.at("data.eval", "there are no held-out pairs", remedy)
    # Imports torch and megatron-core, which takes seconds: after the checks.
    from megatron_idpo.evaluate.likelihood.run import likelihood

    return likelihood(config, eval_models(config), evaluation_output(config))

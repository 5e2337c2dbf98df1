"""The verb `generate`: answers of one or several models to held-out prompts."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.evaluate.generate.engine import choose_engine
from megatron_idpo.evaluate.models import eval_models, evaluation_output

REQUIRED = ("model",)
OPTIONAL = ("data", "training", "evaluate", "generate")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Generates the answers of every model; returns the exit code.

    Raises:
        UserError: a check or a model fails; answers up to then are complete.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if problems := _problems(config):
        raise ConfigError.of(problems)
    models = eval_models(config)
    output = evaluation_output(config)
    engine = choose_engine(config.generate.engine)
    # Imports torch and Transformers, which takes seconds: only after these checks.
    from megatron_idpo.evaluate.generate.task import generate

    generate(config, models, output, engine)
    return 0


def _problems(config: RunConfig) -> list[Problem]:
    """Requirements of this verb on valid sections."""
    problems = []
    world_size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world_size != "1":
        message = f"{world_size} processes were started, but `generate` runs in one"
        problems.append(Problem("torchrun", message, "start it without torchrun"))
    if config.generate.prompts is None and not (config.has("data") and config.data.holds_out):
        remedy = "name a file of prompts, or hold out pairs with data.eval or data.eval_fraction"
        problems.append(Problem("generate.prompts", "there are no prompts", remedy))
    return problems

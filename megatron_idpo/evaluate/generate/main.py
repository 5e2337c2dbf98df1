"""The verb `generate`: what its configuration has to say."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.evaluate.generate.engine import choose_engine
from megatron_idpo.evaluate.models import evaluation_directory, subjects

REQUIRED = ("model",)
OPTIONAL = ("data", "training", "evaluate", "generate")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Answer the prompts with every model; returns the exit code.

    Raises:
        UserError: what was answered before is complete.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if problems := _problems(config):
        raise ConfigError.of(problems)
    models = subjects(config)
    output = evaluation_directory(config)
    engine = choose_engine(config.generate.engine)
    from megatron_idpo.evaluate.generate.run import generate  # torch and Transformers: after checks

    return generate(config, models, output, engine)


def _problems(config: RunConfig) -> list[Problem]:
    """What this verb cannot do, although each section is right."""
    found = []
    world_size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world_size != "1":
        message = f"there are {world_size} processes, and one answers all prompts"
        found.append(Problem("torchrun", message, "start it without torchrun"))
    if config.generate.prompts == ():
        remedy = "name at least one file or dataset, or leave it out"
        found.append(Problem("generate.prompts", "names no source", remedy))
    if config.generate.prompts is None and not (config.has("data") and config.data.holds_out):
        remedy = "name a file of prompts, or held-out pairs in data.eval or data.eval_fraction"
        found.append(Problem("generate.prompts", "there are no prompts to answer", remedy))
    return found

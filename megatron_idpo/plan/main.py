"""The verb `plan`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError
from megatron_idpo.plan.devices import Device, find_device
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.report import does_not_fit, print_plan, print_search
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes
from megatron_idpo.plan.search import nearest_that_fits, search

REQUIRED = ("model", "data", "optimizer", "training")

KNOWN_PAIRS = {"trl-lib/ultrafeedback_binarized": 62135, "HuggingFaceH4/orca_dpo_pairs": 12359}
"""Training pairs of data sets that the examples name."""

WIDTH = 120
"""Columns of the output where it is not a terminal."""


def main(
    config_path: Path,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    device_name: str = "h100",
    as_json: bool = False,
    searches: bool = False,
    assumed: Assumptions | None = None,
) -> int:
    """Print the plan of a configuration.

    Args:
        config_path: the YAML file.
        overrides: `section.field=value`.
        gpus: of the run; None: as few as one replica needs.
        device_name: of `devices.py`, or `cpu`.
        as_json: print JSON instead of text.
        searches: print the layouts that fit instead of the plan of the configuration's.
        assumed: what the data would say.

    Returns:
        0 if it fits, else `EXIT_USER_ERROR`.

    Raises:
        ConfigError: an error in the configuration, an unknown model or device.
    """
    config = load_config(config_path, overrides, required=REQUIRED, optional=SECTIONS)
    model = find_model(config.model.path)
    world_size = gpus if gpus is not None else config.layout.min_ranks
    if world_size < 1:
        raise ConfigError.at("--gpus", f"is {world_size}", "give the number of GPUs of the run")
    device = find_device(device_name, world_size)
    assumed = _with_pairs(config, assumed or Assumptions())
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    if searches:
        any_layout = config.model_copy(update={"layout": type(config.layout)()})
        run = RunSizes.of(any_layout, model.sizes, world_size, assumed)
        found = search(run, device)
        if as_json:
            print(json.dumps([one.plan.as_dict() | {"settings": one.settings} for one in found]))
        elif found:
            print_search(found, run, device, model, console)
        if not found:
            raise _refusal(run, device, f"no layout fits {world_size} × {device.name}")
        return 0
    try:
        run = RunSizes.of(config, model.sizes, world_size, assumed)
    except ConfigError as error:
        raise ConfigError(f"{error}\n`--search` finds layouts that fit") from None
    plan = Plan.of(run, device)
    if as_json:
        print(json.dumps(plan.as_dict()))
        return 0 if plan.fits else EXIT_USER_ERROR
    print_plan(plan, model, console)
    if not plan.fits:
        raise _does_not_fit(plan)
    return 0


def _does_not_fit(plan: Plan) -> ConfigError:
    found = search(plan.run, plan.device)
    if found:
        settings = " ".join(found[0].settings)
        remedy = f"the fastest that fits {plan.run.world_size} × {plan.device.name}: {settings}"
        return ConfigError.at("layout", does_not_fit(plan), remedy)
    return _refusal(plan.run, plan.device, does_not_fit(plan))


def _refusal(run: RunSizes, device: Device, message: str) -> ConfigError:
    nearest = nearest_that_fits(run, device)
    lines = "".join(f"\n  - {one}" for one in nearest) or " nothing that was tried"
    return ConfigError.at("layout", message, f"what fits:{lines}")


def _with_pairs(config: RunConfig, assumed: Assumptions) -> Assumptions:
    """With the number of training pairs, where it is known without reading them."""
    if assumed.pairs is not None:
        return assumed
    counts = [_count(source.path) for source in config.data.train]
    if any(count is None for count in counts):
        return assumed
    weights = [source.weight for source in config.data.train]
    known = [count or 0 for count in counts]
    pairs = sum(count * weight for count, weight in zip(known, weights, strict=True))
    return replace(assumed, pairs=round(pairs))


def _count(path: str) -> int | None:
    if path in KNOWN_PAIRS:
        return KNOWN_PAIRS[path]
    file = Path(path).expanduser()
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())

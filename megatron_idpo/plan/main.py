"""The verb `plan`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError
from megatron_idpo.plan.devices import Device, find_device
from megatron_idpo.plan.models import ModelFound, find_model
from megatron_idpo.plan.nearest import nearest_that_fits, not_supported
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.report import does_not_fit, print_plan, print_search
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes
from megatron_idpo.plan.search import search

REQUIRED = ("model", "data", "optimizer", "training")

KNOWN_PAIRS = {
    "trl-lib/ultrafeedback_binarized": 62135,
    "HuggingFaceH4/orca_dpo_pairs": 12359,
    "allenai/ultrafeedback_binarized_cleaned": 60000,
}
"""Training pairs of data sets that the examples name; the last number is the sDPO paper's."""

SAMPLED_LINES = 200
BYTES_PER_TOKEN = 4
"""Of English text, JSON's keys and a prompt that is repeated included."""

GB = 1e9
"""Bytes of `training.memory_gb`."""

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
    headroom: float | None = None,
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
        headroom: share of the memory that advice leaves free; None: the device's.
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
    if config.training.memory_gb is not None:
        device = replace(device, memory_bytes=config.training.memory_gb * GB)
    if headroom is not None:
        if not 0 <= headroom < 1:
            raise ConfigError.at("--headroom", f"is {headroom}", "give a share such as 0.06")
        device = replace(device, headroom=headroom)
    assumed = with_data(config, assumed or Assumptions())
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    if searches:
        return _search(config, model, world_size, device, assumed, console if not as_json else None)
    try:
        run = RunSizes.of(config, model.sizes, world_size, assumed)
    except ConfigError as error:
        raise ConfigError(f"{error}{_other_worlds(config.layout, world_size)}") from None
    plan = Plan.of(run, device)
    if as_json:
        fits = {"model_source": model.source}
        if not plan.fits:
            fits["nearest"] = nearest_that_fits(run, device)  # type: ignore[assignment]
        print(json.dumps(plan.as_dict() | fits))
        return 0 if plan.fits else EXIT_USER_ERROR
    print_plan(plan, model, console)
    if not plan.fits:
        raise _refusal(run, device, does_not_fit(plan))
    return 0


def _search(
    config: RunConfig,
    model: ModelFound,
    world_size: int,
    device: Device,
    assumed: Assumptions,
    console: Console | None,
) -> int:
    """Print the layouts that fit; without a console as JSON."""
    layout = config.layout
    if layout.problems_for(model.sizes, world_size):  # then only other layouts are compared
        layout = type(layout)()
    any_layout = config.model_copy(update={"layout": type(layout)()})
    run = RunSizes.of(any_layout, model.sizes, world_size, assumed)
    run = replace(run, layout=layout)
    found = search(run, device)
    message = f"no layout fits {world_size} × {device.name}"
    if console is None:
        layouts = [
            one.plan.as_dict()
            | {"settings": one.settings, "limited_by": one.limit, "is_in_file": one.is_in_file}
            for one in found
        ]
        nearest = [] if found else nearest_that_fits(run, device)
        print(json.dumps({"layouts": layouts, "nearest": nearest, "model_source": model.source}))
        return 0 if found else EXIT_USER_ERROR
    if not found:
        raise _refusal(run, device, message)
    print_search(found, run, device, model, console)
    return 0


def _refusal(run: RunSizes, device: Device, message: str) -> ConfigError:
    nearest = nearest_that_fits(run, device)
    lines = "".join(f"\n  - {one}" for one in nearest) or " nothing that was tried"
    if not any("layout:" in line for line in nearest) and (other := not_supported(run)):
        lines += f"\n{other}"
    return ConfigError.at("layout", message, f"what fits:{lines}")


def _other_worlds(layout: Layout, world_size: int) -> str:
    """Numbers of GPUs next to this one that the layout divides."""
    ranks = layout.min_ranks
    lower, higher = world_size // ranks * ranks, (world_size // ranks + 1) * ranks
    if lower == world_size:
        return "\n`--search` finds layouts that fit"
    numbers = f"{lower} or {higher}" if lower else str(higher)
    return f"\nthis layout: --gpus {numbers}; `--search` finds others"


def with_data(config: RunConfig, assumed: Assumptions) -> Assumptions:
    """What is assumed, with number and length of the pairs where files or a table have them."""
    files = [_local_jsonl(source.path) for source in config.data.train]
    if not assumed.pair_tokens and None not in files:
        tokens = _mean_tokens([file for file in files if file])
        if tokens:
            assumed = replace(assumed, pair_tokens=tokens, origin="data.train: bytes / 4")
    if assumed.pairs is not None:
        return assumed
    counts = [_count(source.path) for source in config.data.train]
    if any(count is None for count in counts):
        return assumed
    weights = [source.weight for source in config.data.train]
    known = [count or 0 for count in counts]
    pairs = sum(count * weight for count, weight in zip(known, weights, strict=True))
    return replace(assumed, pairs=round(pairs))


def _local_jsonl(path: str) -> Path | None:
    file = Path(path).expanduser()
    return file if file.suffix == ".jsonl" and file.is_file() else None


def _count(path: str) -> int | None:
    if path in KNOWN_PAIRS:
        return KNOWN_PAIRS[path]
    if (file := _local_jsonl(path)) is None:
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _mean_tokens(files: list[Path]) -> int:
    """Tokens of a line, estimated from the first lines of each file."""
    sizes = []
    for file in files:
        with file.open("rb") as lines:
            sizes += [len(line) for line in islice(lines, SAMPLED_LINES) if line.strip()]
    return round(sum(sizes) / len(sizes) / BYTES_PER_TOKEN) if sizes else 0

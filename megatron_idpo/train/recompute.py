"""`training.recompute: auto`: the fewest recomputed layers that fit into `training.memory_gb`.

The memory of a run is estimated as by the verb `plan`, with the lengths of the run's own pairs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.data.pairs import pair_tokens
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import all_gather_objects, raise_on_all_ranks
from megatron_idpo.plan.choices import cheapest_recompute, fits
from megatron_idpo.plan.devices import DEVICES, Device, find_device
from megatron_idpo.plan.memory import run_memory
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes

GB = 1e9
MIN_ROW_TOKENS = 128
"""Rows are not made shorter than this to fit."""


def choose_recompute(
    config: RunConfig, pairs: PairDataset, world_size: int, saved: Mapping[str, Any] | None
) -> tuple[RunConfig, str | None]:
    """Replace `training.recompute: auto`. Collective.

    Recomputation changes no result, so a resumed run may choose again. It keeps the choice of the
    checkpoint while that fits, and says why not if it does not.

    Args:
        config: of the run.
        pairs: to train on.
        world_size: of the run.
        saved: the configuration in the checkpoint that the run resumes from.

    Returns:
        The configuration with the choice in place of `auto`, and a line that says what was chosen
        and why; None if the setting is not `auto`.

    Raises:
        ConfigError: on every rank; the memory is not known, or nothing fits.
    """
    if config.training.recompute != "auto":
        return config, None
    with raise_on_all_ranks("choosing what to recompute"):
        device = _device(config.training)
    # GPUs of one run may differ: every rank chooses for the smallest.
    device = replace(device, memory_bytes=min(all_gather_objects(device.memory_bytes)))
    with raise_on_all_ranks("choosing what to recompute"):
        lengths_P3 = pairs.lengths_P3[:]
        tokens_P = pair_tokens(lengths_P3, share_prompt=config.data.share_prompt)
        assumed = Assumptions(
            pair_tokens=max(1, round(tokens_P.mean())),
            scored_share=float(lengths_P3[:, 1:].sum() / tokens_P.sum()),
        )
        run = RunSizes.of(config, find_model(config.model.path).sizes, world_size, assumed)
        chosen, message = _choose(run, device, int(tokens_P.max()), saved)
    changed = {
        "recompute": chosen.recompute,
        "recompute_layers": chosen.recompute_layers,
        "memory_gb": None,
    }
    training = config.training.model_copy(update=changed)
    return config.model_copy(update={"training": training}), message


def _device(training: TrainingConfig) -> Device:
    """The device of this rank, with the memory that it may use."""
    if torch.cuda.is_available():
        device = DEVICES["h100"]  # only its margins count here
        total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        device = replace(device, name="GPU", memory_bytes=float(total_bytes))
    else:
        device = find_device("cpu", 1)
        if training.memory_gb is None:
            message = "is needed on a CPU with training.recompute: auto"
            remedy = "set it to the memory of one process, or set training.recompute to off or full"
            raise ConfigError.at("training.memory_gb", message, remedy)
    if training.memory_gb is None:
        return device
    return replace(device, memory_bytes=training.memory_gb * GB)


def _choose(
    run: RunSizes, device: Device, longest_tokens: int, saved: Mapping[str, Any] | None
) -> tuple[RunSizes, str]:
    """The run as it will be, and the line that says why."""
    limit = f"{device.memory_bytes / GB:.2f} GB"
    before = (saved or {}).get("training") or {}
    reason = ""
    if before.get("recompute") in ("off", "full"):
        setting, layers = before["recompute"], before.get("recompute_layers")
        kept = replace(run, recompute=setting, recompute_layers=layers)
        if fits(run_memory(kept, device), device):
            return kept, _message(kept, device, f"as in the checkpoint; limit {limit}")
        reason = f"; the checkpoint's {_setting(kept)} needs {_peak_gb(kept, device):.2f} GB"
    chosen = cheapest_recompute(run, device)
    if chosen is None:
        raise _too_little(run, device, longest_tokens)
    return chosen.run, _message(chosen.run, device, f"{chosen.reason} into {limit}{reason}")


def _message(run: RunSizes, device: Device, reason: str) -> str:
    peak = f"{_peak_gb(run, device):.2f} GB"
    return f"recompute auto: {_setting(run)}; planned peak {peak} ({reason})"


def _setting(run: RunSizes) -> str:
    if run.recompute == "off":
        return "off"
    layers = "all" if run.recompute_layers is None else f"the first {run.recompute_layers}"
    return f"full, {layers} layers of a chunk"


def _peak_gb(run: RunSizes, device: Device) -> float:
    return max(stage.total for stage in run_memory(run, device)) / GB


def _too_little(run: RunSizes, device: Device, longest_tokens: int) -> ConfigError:
    """The limit is below what a run needs that recomputes everything."""
    run = replace(run, recompute="full", recompute_layers=None)
    needed = _peak_gb(run, device)
    message = f"is too little: with all layers recomputed, the run needs {needed:.2f} GB, and "
    message += f"{device.memory_bytes / GB:.2f} are allowed"
    remedy = f"set training.memory_gb to at least {needed:.2f}, or use a GPU with more memory"
    shorter = replace(run, row_tokens=run.row_tokens // 2)
    while shorter.row_tokens >= max(longest_tokens, MIN_ROW_TOKENS):
        if fits(run_memory(shorter, device), device):
            remedy = f"set data.row_tokens to {shorter.row_tokens}, or {remedy}"
            break
        shorter = replace(shorter, row_tokens=shorter.row_tokens // 2)
    return ConfigError.at("training.memory_gb", message, remedy)

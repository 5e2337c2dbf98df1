"""Megatron-Bridge as another converter, for families that ours does not know.

Optional and imported only when asked for (`--backend bridge`): it needs Transformer Engine and a
GPU even to import, and its rope handling differs from Transformers' for some models (see
docs/decisions.md), which is why it is never chosen silently. What it writes is Megatron-Bridge's
own checkpoint layout, and goes back through Megatron-Bridge.

Not run on this project's test machines, which have no GPU: the tests replace the library.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.errors import CheckpointError, ConfigError, Problem

_PLACE = "--backend bridge"


def bridge_problems() -> list[Problem]:
    """Every reason why Megatron-Bridge cannot work on this machine; none of it is imported."""
    found = []
    if not torch.cuda.is_available():
        found.append(
            Problem(_PLACE, "Megatron-Bridge needs a GPU, and torch sees none", "use one with CUDA")
        )
    for module, remedy in (
        ("transformer_engine", "pip install 'megatron-idpo[te]'"),
        ("megatron.bridge", "pip install --no-deps megatron-bridge"),
    ):
        if not _is_installed(module):
            found.append(Problem(_PLACE, f"{module} is not installed", remedy))
    return found


def bridge_import(source: Path, target: Path, *, dtype: torch.dtype | None) -> None:
    """Hugging Face to Megatron by `AutoBridge.import_ckpt` (Megatron-Bridge 0.6).

    Raises:
        ConfigError: the library cannot work here; every reason is listed.
        CheckpointError: it failed; its own words are passed on.
    """
    chosen = {} if dtype is None else {"torch_dtype": dtype}
    _run(source, lambda bridge: bridge.import_ckpt(str(source), str(target), **chosen))


def bridge_export(source: Path, hf_model: Path, target: Path) -> None:
    """Megatron to Hugging Face by `AutoBridge.export_ckpt` (Megatron-Bridge 0.6).

    Args:
        source: the checkpoint that `bridge_import` wrote.
        hf_model: the Hugging Face directory or hub name that it came from; its configuration and
            tokenizer go along.
        target: directory to write.

    Raises:
        ConfigError: the library cannot work here; every reason is listed.
        CheckpointError: it failed; its own words are passed on.
    """

    def export(bridge: Any) -> None:
        model = bridge.from_hf_pretrained(str(hf_model))
        model.export_ckpt(megatron_path=str(source), hf_path=str(target))

    _run(source, export)


def _run(source: Path, work: Any) -> None:
    found = bridge_problems()
    if found:
        raise ConfigError.of(found)
    try:
        work(importlib.import_module("megatron.bridge").AutoBridge)
    except Exception as error:  # a library of many families fails in many ways
        raise CheckpointError.at(str(source), f"Megatron-Bridge failed ({error})") from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False

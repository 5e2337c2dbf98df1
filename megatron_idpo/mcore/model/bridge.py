"""Conversion with Megatron-Bridge, for model families that our converter does not support.

Optional, and imported only for `--backend bridge`: it needs Transformer Engine and a GPU even to
import, and its rope handling differs from Transformers' for some models (see docs/decisions.md), so
it is never selected automatically. It writes Megatron-Bridge's own checkpoint format, which only
Megatron-Bridge converts back.

Not run on this project's test machines, which have no GPU: the tests replace the library.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.errors import CheckpointError, ConfigError, Problem

_LOCATION = "--backend bridge"


def bridge_problems() -> list[Problem]:
    """All reasons why Megatron-Bridge cannot run on this machine; imports none of it."""
    problems = []
    if not torch.cuda.is_available():
        problems.append(
            Problem(
                _LOCATION, "Megatron-Bridge needs a GPU, and torch sees none", "use one with CUDA"
            )
        )
    for module, remedy in (
        ("transformer_engine", "pip install 'megatron-idpo[te]'"),
        ("megatron.bridge", "pip install --no-deps megatron-bridge"),
    ):
        if not _is_installed(module):
            problems.append(Problem(_LOCATION, f"{module} is not installed", remedy))
    return problems


def bridge_import(source: Path, target: Path, *, dtype: torch.dtype | None) -> None:
    """Convert Hugging Face to Megatron with `AutoBridge.import_ckpt` (Megatron-Bridge 0.6).

    Raises:
        ConfigError: the library cannot run here; lists all reasons.
        CheckpointError: it failed; contains its message.
    """
    options = {} if dtype is None else {"torch_dtype": dtype}

    def convert(bridge: Any) -> None:
        bridge.import_ckpt(str(source), str(target), trust_remote_code=False, **options)

    _run(source, convert)


def bridge_export(source: Path, hf_model: Path, target: Path) -> None:
    """Convert Megatron to Hugging Face with `AutoBridge.export_ckpt` (Megatron-Bridge 0.6).

    Args:
        source: the checkpoint that `bridge_import` wrote.
        hf_model: the Hugging Face directory or hub name that it was converted from; its
            configuration and tokenizer are copied.
        target: directory to write.

    Raises:
        ConfigError: the library cannot run here; lists all reasons.
        CheckpointError: it failed; contains its message.
    """

    def export(bridge: Any) -> None:
        model = bridge.from_hf_pretrained(str(hf_model), trust_remote_code=False)
        model.export_ckpt(megatron_path=str(source), hf_path=str(target))

    _run(source, export)


def _run(source: Path, convert: Callable[[Any], None]) -> None:
    problems = bridge_problems()
    if problems:
        raise ConfigError.of(problems)
    try:
        convert(importlib.import_module("megatron.bridge").AutoBridge)
    except Exception as error:  # the library raises many types, depending on the family
        raise CheckpointError.at(str(source), f"Megatron-Bridge failed ({error})") from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False

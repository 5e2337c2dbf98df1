"""Conversion with Megatron-Bridge, for model families that our converter does not support.

Optional, and imported only for `--backend bridge`: it needs Transformer Engine and a GPU even to
import, and its rope handling differs from Transformers' for some models (see docs/decisions.md), so
it is never selected automatically. It writes Megatron-Bridge's own checkpoint format, which only
Megatron-Bridge converts back.

Its checkpoints have a `run_config.yaml` with names of Python functions, which it imports and calls
(`_target_`, as in Hydra). Before it reads a checkpoint, these are compared with what it writes.

Not run on this project's test machines, which have no GPU: the tests replace the library.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import CheckpointError, ConfigError, Problem

_LOCATION = "--backend bridge"

_RUN_CONFIG = "run_config.yaml"
_OWN = r"megatron\.(?:bridge|core|training)"
_CLASS = r"(?:\w+\.)*[A-Z]\w*"
_NAMES = {
    "calls": re.compile(rf"{_OWN}\.{_CLASS}|(?:{_OWN}|transformers)\.{_CLASS}\.from_dict"),
    "binds arguments to": re.compile(rf"torch\.nn\.init\.\w+|{_OWN}\.(?:\w+\.)*\w*spec\w*"),
    "names": re.compile(
        rf"{_OWN}\.[\w.]+|torch\.(?:bfloat16|float\d\w*|u?int\d+)|torch\.(?:nn|_C\._nn)\.[\w.]+"
    ),
}
"""What it does with a name -> the names for which it does so.

It calls classes: dataclasses, enumerations, configurations. Functions of the same packages load
files and run programs, so none may be called, or be given arguments for a later call, but
initial values and layer specs. Dtypes, activations and specs are only named.
"""


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
        ("transformer_engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"),
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

    check_run_configs(source)
    _run(source, export)


def directories_of(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint's directory and all below it, also behind links."""
    seen: set[str] = set()
    for directory, below, _ in os.walk(checkpoint, followlinks=True):
        below[:] = sorted(name for name in below if os.path.realpath(directory) not in seen)
        seen.add(os.path.realpath(directory))
        yield Path(directory)


def check_run_configs(checkpoint: Path) -> None:
    """Checks that each `run_config.yaml` names only what Megatron-Bridge itself writes into it.

    Raises:
        CheckpointError: it names something else, or cannot be read.
    """
    for directory in directories_of(checkpoint):
        if (path := directory / _RUN_CONFIG).exists():
            try:
                tree = read_tree(path)
            except ConfigError as error:
                raise CheckpointError.of(error.problems) from None
            if tree.problems:
                raise CheckpointError.of(tree.problems)
            for found in _unknown_names(tree.values):
                message = f"{found}, which Megatron-Bridge does not write"
                remedy = "export a checkpoint that Megatron-Bridge wrote, without edits"
                raise CheckpointError.at(str(path), message, remedy)


def _unknown_names(value: Any) -> Iterator[str]:
    if isinstance(value, str) and "${" in value:
        yield f"has the interpolation {value!r:.80}"  # it can build any node
    elif isinstance(value, list):
        for part in value:
            yield from _unknown_names(part)
    elif isinstance(value, dict):
        if "<<" in value:
            yield "has a merge key (<<)"
        if "_target_" in value:
            name = value["_target_"]
            use = "binds arguments to" if value.get("_partial_") is True else "calls"
            use = "names" if value.get("_call_") is False else use
            if not isinstance(name, str) or not _NAMES[use].fullmatch(name):
                yield f"{use} {name!r:.80}"
        for part in value.values():
            yield from _unknown_names(part)


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

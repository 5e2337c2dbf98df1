"""Helpers for the tests of launch/: its files, and a check of a machine's command."""

import importlib.util
from pathlib import Path
from typing import Any

from torch.distributed.run import parse_args as parse_torchrun

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def load_script(name: str) -> Any:
    """A script of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_command(command: list[str], *, nodes: int, rank: int, gpus: int = 8) -> None:
    """Check that torchrun accepts a machine's command and that it fits the configuration."""
    python, script, *rest = command
    assert Path(python).name.startswith("python") and script == "launch/node.py"
    options = parse_torchrun(rest)
    assert (options.nnodes, options.node_rank) == (str(nodes), rank)
    assert options.nproc_per_node == str(gpus)
    assert options.module and options.training_script == "megatron_idpo"
    verb, config, *overrides = options.training_script_args
    assert verb == "train"
    layout = load_config(ROOT / config, overrides, optional=SECTIONS).layout
    assert layout.problems_for(world_size=nodes * gpus) == []

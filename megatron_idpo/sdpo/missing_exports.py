"""Exports that are wanted now and were not when their step's model was in memory."""

from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.sdpo.manifest import Manifest
from megatron_idpo.sdpo.retention import snapshot_directory
from megatron_idpo.train.run_directory import RunDirectory


def missing_exports(config: RunConfig, root: Path, manifest: Manifest) -> list[str]:
    """A line for each model that complete steps should have left and did not: how to make it.

    Args:
        config: with the section `sdpo`.
        root: the run's directory.
        manifest: its manifest.
    """
    assert config.sdpo is not None
    numbers = range(1, len(manifest.steps) + 1)
    wanted = [
        (number, RunDirectory(root / step_name(number)).hf)
        for number in numbers
        if config.sdpo.steps[number - 1].export and manifest.step(number).state == "complete"
    ]
    if config.training.export and manifest.next_step is None:
        wanted.append((len(manifest.steps), RunDirectory(root).hf))
    return [_describe(root, manifest, number, hf) for number, hf in wanted if not hf.exists()]


def _describe(root: Path, manifest: Manifest, number: int, hf: Path) -> str:
    snapshot = snapshot_directory(root, number)
    if manifest.step(number).is_removed:
        return f"there is no {hf}, and {snapshot}, of which it could be made, has been removed"
    if manifest.adapters == "carry":
        return f"there is no {hf}; the adapter for PEFT is in {snapshot}"
    return f"there is no {hf}; to make it: megatron-idpo convert megatron-to-hf {snapshot} {hf}"

"""sDPO runs of a tiny model, shared by tests of `sdpo/`.

24 pairs are assigned to the steps by fractions and at random. With 6 pairs per optimizer step, half
of them are two optimizer steps per epoch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.sdpo.manifest import Manifest, read_manifest

from ..train.tiny_run import LORA, Files, Outcome, exported, run, write_config

__all__ = ["LORA", "Files", "Outcome", "exported", "run"]

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "merge": {"lora": LORA, "sdpo": {"adapters": "merge"}},
    "carry": {"lora": LORA, "sdpo": {"adapters": "carry"}},
}
"""Full training, or LoRA with adapters that are merged or carried between steps."""

TWO_STEPS: Sequence[Mapping[str, Any]] = ({"fraction": 0.5}, {"fraction": 0.5})
EXPORTING: Sequence[Mapping[str, Any]] = ({"fraction": 0.5, "export": True}, {"fraction": 0.5})
THREE_STEPS: Sequence[Mapping[str, Any]] = (
    {"fraction": 0.5},
    {"fraction": 0.25, "lr": 5e-3, "layers": [2]},
    {"fraction": 0.25, "beta": 0.5},
)


def stepped_config(
    tiny: Files,
    output: Path,
    kind: str = "merge",
    steps: Sequence[Mapping[str, Any]] = TWO_STEPS,
    **sections: Mapping[str, Any] | None,
) -> str:
    """A configuration file next to `output`; `sections` change and add fields."""
    config: dict[str, Any] = {
        "data": {"eval": str(tiny.held_out)},
        "reference": {"source": "cache"},
        "sdpo": {"steps": [dict(step) for step in steps], "order": "random"},
        "training": {"epochs": 2},
    }
    for changes in (KINDS[kind], sections):
        for name, fields in changes.items():
            config[name] = None if fields is None else {**(config.get(name) or {}), **fields}
    return write_config(tiny, output, **config)


def manifest_of(output: Path) -> Manifest:
    """The manifest of a run."""
    manifest = read_manifest(output)
    assert manifest is not None
    return manifest


def states(output: Path) -> list[str]:
    """State of every step."""
    return [step.state for step in manifest_of(output).steps]


def snapshots(output: Path) -> list[str | None]:
    """Identity of every step's snapshot."""
    return [step.snapshot for step in manifest_of(output).steps]


def start_checks(outcome: Outcome) -> int:
    """Number of steps with a start check."""
    return outcome.printed.count("start check passed")


def cached_logps(directory: Path) -> dict[int, Tensor]:
    """A finished reference cache: float32 [P, 2], by layer."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "reference.parquet").to_pandas()
    return {
        int(layer): torch.tensor(rows[["chosen_logps", "rejected_logps"]].to_numpy())
        for layer, rows in table.sort_values(["layer", "pair"]).groupby("layer")
    }


def slice_of(output: Path, step: int) -> list[int]:
    """Training pairs of a step."""
    import pyarrow.parquet as pq

    table = pq.read_table(output / "curriculum.parquet").to_pandas()
    return [int(pair) for pair in table.pair[table.step == step]]

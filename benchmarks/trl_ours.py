"""This package's side of `compare_trl.py`: the steps of the verb `train`, in one process.

It builds a run from a configuration as `train` does and takes its steps; what `train` does between
steps (logs, checkpoints) is left out on both sides.

Settings in `Case.side`: `row_tokens` (positions of a micro-batch), `trim_tokens` (what rows are cut
to a multiple of: every length compiles separate kernels) and `recompute` (`off`, or `full`:
activations are computed again in the backward pass; of `recompute_layers`, where that is there; or
`auto` within `memory_gb`).
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from trl_case import (
    BETA,
    INTERMEDIATE_WEIGHT,
    SEED,
    TARGETS,
    Case,
    Clock,
    Measured,
    TokenPair,
    digest,
)

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
from megatron_idpo.train.run_directory import open_run_directory
from megatron_idpo.train.setup import assemble, prepare


def train(case: Case) -> Measured:
    """Train on all records of the case."""
    torch.set_num_threads(case.threads)
    clock = Clock()
    losses: list[float] = []
    margins: list[float] = []
    tokens: list[str] = []
    positions = 0
    with tempfile.TemporaryDirectory() as output:
        file = Path(output) / "config.yaml"
        file.write_text(write_yaml(_config(case, output)))
        config = load_config(file, required=REQUIRED, optional=OPTIONAL)
        with (
            distributed_world() as world,
            open_run_directory(Path(config.training.output)) as directory,
        ):
            prepared = prepare(config, world)
            with running_layout(config.layout, config.training.seed):
                run = assemble(config, world, directory, prepared)
                clock.start()
                for step, batch in enumerate(run.batches):
                    metrics, _ = run.train_step.train(
                        batch, step + 1, lr=run.learning_rate.at(step)
                    )
                    clock.step_done()
                    values = metrics.values()
                    losses.append(values["loss"])
                    margins.append(values["rewards/margins"])
                    tokens.append(digest(_pairs(batch)))
                    positions += batch.computed_tokens
    return clock.measured(losses=losses, margins=margins, tokens=tokens, positions=positions)


def _config(case: Case, output: str) -> dict[str, Any]:
    side = {
        "row_tokens": 2048,
        "trim_tokens": 32,
        "recompute": "off",
        "recompute_layers": None,
        "memory_gb": None,
        **case.side,
    }
    objective: dict[str, Any] = {"beta": BETA, "layers": list(case.layers)}
    if case.layers:
        objective["intermediate_weight"] = INTERMEDIATE_WEIGHT
    return {
        "model": {"path": case.model, "dtype": case.dtype},
        "data": {
            "train": case.records,
            "row_tokens": side["row_tokens"],
            "trim_tokens": side["trim_tokens"],
            "max_length": case.max_length,
            "seed": SEED,
            "cache": f"{output}/tokens",
            "num_workers": 1,
        },
        "objective": objective,
        # Not the default cache, which would be computed before the clock starts.
        "reference": {"source": "adapter_off"},
        "lora": {
            "rank": case.rank,
            "alpha": float(case.rank),
            "targets": list(TARGETS),
            "adapter": case.adapter,
        },
        "optimizer": {"lr": case.lr, "schedule": "constant"},
        "training": {
            "output": f"{output}/run",
            "epochs": case.epochs,
            "global_batch_pairs": case.batch_pairs,
            "recompute": side["recompute"],
            "recompute_layers": side["recompute_layers"],
            "memory_gb": side["memory_gb"],
        },
    }


def _pairs(batch: Batch) -> list[TokenPair]:
    """The pairs of a batch, read back from its rows."""
    return [pair for row in batch.rows for pair in _pairs_of_row(row)]


def _pairs_of_row(row: Row) -> list[TokenPair]:
    def part(first: int, last: int) -> list[int]:
        tokens: list[int] = row.tokens_T[first:last].tolist()
        return tokens

    return [(part(b0, b1), part(b1, b2), part(b2, b3)) for b0, b1, b2, b3 in row.spans_G4.tolist()]

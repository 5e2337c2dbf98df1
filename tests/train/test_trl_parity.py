"""Plain DPO equals TRL's DPOTrainer in every step and layout.

The same 32 pairs (some cut), 8 per step for 10 steps in our shuffled order over two and a half
epochs, fp32, dropout 0, AdamW with warm-up, cosine decay and active clipping; LoRA from the same
adapter, or full training. TRL pads, we pack rows and share prompts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.objective import LOSSES
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import PairDataset, load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.train.metrics.file import Record, read_metrics

from .tiny_run import without_figures
from .trl_case import (
    BATCH_PAIRS,
    EPOCHS,
    MAX_LENGTH,
    NUM_PAIRS,
    SEED,
    STEPS,
    TEMPLATE,
    TrlCase,
    make_case,
)
from .trl_losses import log_probabilities, loss_cases
from .trl_reference import TIMEOUT_S, TrlResult, TrlRun, run_trl

LOSS_TOLERANCE = 2e-5
"""Measured: at most 4e-6. fp32 rounding grows with the steps: Adam normalizes gradients."""

LOSS_RELATIVE = 2e-6
"""Of a loss and of its gradient, on the same log-probabilities: float32, a few operations."""

METRIC_TOLERANCES = {
    "rewards/chosen": 5e-5,
    "rewards/rejected": 5e-5,
    "rewards/margins": 5e-5,
    "rewards/accuracies": 1e-6,
    "logps/chosen": 5e-4,
    "logps/rejected": 5e-4,
    "grad_norm": 1e-3,
    "learning_rate": 1e-12,
}
"""Absolute, about ten times the measured differences. Log-probabilities are in the hundreds, norms
in the tens."""

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
WARMUP_STEPS = 3

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
}
"""Processes and the `layout` section."""


@dataclass(frozen=True)
class TrlRuns:
    """The case and TRL's results."""

    case: TrlCase
    results: dict[str, TrlResult]
    adapter: Path
    losses: list[dict[str, Any]]
    """Of each case of `loss_cases`."""


@pytest.fixture(scope="module")
def trl(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> TrlRuns:
    directory = tmp_path_factory.mktemp("trl")
    case = make_case(directory)
    runs = {
        trained: TrlRun(
            model=str(case.model),
            records=str(case.ordered),
            output=str(directory / trained),
            chat_template=TEMPLATE,
            max_length=MAX_LENGTH,
            batch_pairs=BATCH_PAIRS,
            micro_pairs=BATCH_PAIRS // 2,
            lora=LORA if trained == "lora" else None,
            optimizer={
                "learning_rate": lr,
                "lr_scheduler_type": "cosine",
                "warmup_steps": WARMUP_STEPS,
                "max_grad_norm": case.clip_grads[trained],
            },
        )
        for trained, lr in case.lrs.items()
    }
    ((results, losses),) = workers.run_as_program(
        run_trl, 1, list(runs.values()), timeout_s=TIMEOUT_S
    )
    results_by_name = dict(zip(runs, results, strict=True))
    return TrlRuns(case, results_by_name, directory / "lora" / "adapter", losses)


@pytest.fixture(scope="module")
def pairs(trl: TrlRuns, tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    return load_pairs(
        [SourceConfig(path=str(trl.case.records))],
        load_tokenizer(str(trl.case.model), TEMPLATE),
        TokenOptions(max_length=MAX_LENGTH),
        cache=tmp_path_factory.mktemp("tokens"),
        num_workers=1,
    )


def test_every_loss_has_the_value_and_the_gradient_of_trl(trl: TrlRuns) -> None:
    """On the same log-probabilities, whose gradient is the same for every token of an answer."""
    assert {case["loss"] for case in loss_cases() if isinstance(case["loss"], str)} == set(LOSSES)
    given = log_probabilities()
    mask_ST, wrong = given["mask_ST"], {}
    for fields, theirs in zip(loss_cases(), trl.losses, strict=True):
        logps_S = given["logps_ST"].sum(1).requires_grad_()
        loss_P = layer_loss(
            _alternating(logps_S),
            _alternating(given["reference_S"]),
            _alternating(mask_ST.sum(1)),
            Objective(**fields),
            sharpened_logps_2P=_alternating(given["sharpened_ST"].sum(1)),
        )
        (gradient_S,) = torch.autograd.grad(loss_P.mean(), logps_S)
        gradient_ST = torch.tensor(theirs["gradient"]) * mask_ST  # a model's padding is constant
        differences = (
            abs(loss_P.mean().item() / theirs["loss"] - 1),
            float((gradient_S[:, None] * mask_ST - gradient_ST).norm() / gradient_ST.norm()),
        )
        if not max(differences) <= LOSS_RELATIVE:
            wrong[str(fields)] = differences
    assert not wrong


def _alternating(values_S: Tensor) -> Tensor:
    """From all chosen, then all rejected answers to pairs."""
    return torch.stack(values_S.chunk(2), dim=1).flatten()


def test_tokens_of_every_step_equal_trl(trl: TrlRuns, pairs: PairDataset) -> None:
    """Every step has the same pairs, and each pair the same prompt, chosen and rejected."""
    assert len(pairs) == NUM_PAIRS
    settings = RowSettings(row_tokens=1024, pad_token=0)
    batches = TrainingBatches(
        pairs, settings, global_batch_pairs=BATCH_PAIRS, seed=SEED, epochs=EPOCHS
    )
    ours = [
        sorted(_tokens(pairs, int(index)) for row in batch.rows for index in row.pair_index_P)
        for batch, _ in zip(batches, range(STEPS), strict=False)
    ]
    for result in trl.results.values():
        theirs = [
            sorted(tuple(map(tuple, pair)) for pair in result.pairs[first : first + BATCH_PAIRS])
            for first in range(0, len(result.pairs), BATCH_PAIRS)
        ]
        assert ours == theirs
    assert pairs.report.truncated_pairs > 0, "the case must have truncated answers"
    assert pairs.report.truncated_pairs < len(pairs), "and others"


def _tokens(pairs: PairDataset, index: int) -> tuple[tuple[int, ...], ...]:
    pair = pairs[index]
    parts = (pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens)
    return tuple(tuple(part.tolist()) for part in parts)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        ("lora", "pipeline"),
        ("full", "single"),
        ("full", "data"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                ("lora", "single"),
                ("full", "tensor"),
                ("lora", "tensor"),
                ("lora", "sequence"),
                ("lora", "data"),
                ("full", "sequence"),
                ("full", "pipeline"),
            ]
        ),
    ],
)
def test_every_step_equals_trl(
    trl: TrlRuns, workers: Any, tmp_path: Path, trained: str, layout: str
) -> None:
    processes, section = LAYOUTS[layout]
    if layout == "pipeline":  # stories260K has five layers
        half = trl.case.num_layers // 2
        section = {**section, "pipeline_layers": [trl.case.num_layers - half, half]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(_config(trl, trained, section, tmp_path)))
    assert workers.run(train, processes, str(file)) == [0] * processes
    _compare(
        read_metrics(tmp_path / "run" / "metrics.jsonl"),
        trl.results[trained],
        trl.case.clip_grads[trained],
    )


def train(file: str) -> int:
    """The verb `train`, on every rank."""
    from megatron_idpo.cli.train import main

    torch.set_num_threads(1)
    with without_figures():
        return main(Path(file), [])


def _compare(ours: list[Record], theirs: TrlResult, clip_grad: float) -> None:
    """The loss of every step, and the metrics with equal names."""
    assert len(ours) == len(theirs.logs) == STEPS
    losses = [log["loss"] for log in theirs.logs]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert max(losses) - min(losses) > 0.1, "the loss must change"
    norms = [log["grad_norm"] for log in theirs.logs]
    assert min(norms) < clip_grad < max(norms), "some steps must be clipped"
    differences = [abs(record["loss"] - loss) for record, loss in zip(ours, losses, strict=True)]
    assert max(differences) <= LOSS_TOLERANCE, differences
    for name, tolerance in METRIC_TOLERANCES.items():
        for record, log in zip(ours, theirs.logs, strict=True):
            assert record[name] == pytest.approx(log[name], abs=tolerance), (name, record["step"])


def _config(trl: TrlRuns, trained: str, layout: dict[str, Any], directory: Path) -> dict[str, Any]:
    lora = {
        "rank": LORA["r"],
        "alpha": float(LORA["lora_alpha"]),
        "targets": LORA["target_modules"],
        "adapter": str(trl.adapter),
    }
    return {
        "model": {"path": str(trl.case.model), "dtype": "fp32"},
        "data": {
            "train": str(trl.case.records),
            "row_tokens": 512,
            "trim_tokens": 64,
            "max_length": MAX_LENGTH,
            "chat_template": TEMPLATE,
            "seed": SEED,
            "num_workers": 1,
            "cache": str(directory / "tokens"),
        },
        **({"lora": lora} if trained == "lora" else {}),
        "layout": layout,
        "optimizer": {
            "lr": trl.case.lrs[trained],
            "schedule": "cosine",
            "warmup_steps": WARMUP_STEPS,
            "clip_grad": trl.case.clip_grads[trained],
        },
        "training": {
            "output": str(directory / "run"),
            "global_batch_pairs": BATCH_PAIRS,
            "epochs": EPOCHS,
            "max_steps": STEPS,
            "export": False,
        },
        "checkpoint": {"every_steps": None},
        "logging": {"every_steps": 1},
    }

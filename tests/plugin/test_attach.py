"""Intermediate DPO on megatron-core's schedules equals the oracle, in every layout.

Each case trains three steps with megatron-core's own schedule, gradient reduction and optimizer and
is compared with `tests/oracle.py`: every layer's loss in every step, all gradients of the first
step, all weights after the last. The reference is another model, so that no margin is zero.

The exhaustive cases are a covering array with every feasible combination of three settings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.testing import write_tiny_hf_model
from tests import oracle

from .covering import covering_array
from .training_case import (
    CONTEXT_SPACE,
    EPS,
    LR,
    NUM_LAYERS,
    PAIRS,
    RECOMPUTE,
    SPACE,
    STEPS,
    TRAINED,
    VOCAB,
    Case,
    batches_of_pairs,
    pairs_by_row,
)
from .training_run import megatron_run

LOSS_RELATIVE = 1e-5
"""fp32 sums in another order, through 8 layers and a log-softmax."""

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| per tensor (Frobenius)."""

WEIGHT_IN_LR = 5e-3
"""Weights after three Adam steps with eps 1e-4, in units of the learning rate."""

ARRAY = covering_array(SPACE)
CASES = [Case(**values) for values in ARRAY]
NORMAL = [
    Case(taps="none"),
    # DDP waits for the gradient of every trainable parameter; a norm that no tap reads has none.
    Case(pipeline=2, norm="none", sync="overlap"),
    Case(pipeline=2, virtual=2, recompute="block", sync="distributed_aligned", objective="ipo"),
    Case(pipeline=2, tied=True, taps="three", recompute="uniform", loss_scale=1024.0),
    Case(tensor=2, tied=True, taps="last", trained="frozen_head", reference_layer="final"),
    Case(
        tensor=2,
        sequence_parallel=True,
        taps="first",
        recompute="block",
        rows="with_empty",
        objective="sigmoid_norm+nll",
    ),
    Case(data=2, taps="three", trained="adapters", recompute="uniform", objective="robust"),
    Case(
        tensor=2,
        sequence_parallel=True,
        pipeline=2,
        virtual=2,
        tied=True,
        taps="middle",
        recompute="selective",
        objective="hinge",
    ),
    Case(context=2, pipeline=2, tied=True, taps="three", recompute="uniform", rows="with_empty"),
    Case(
        context=2,
        tensor=2,
        sequence_parallel=True,
        window=5,
        trained="adapters",
        recompute="selective",
        sync="distributed",
    ),
]
"""Which faults these and the cases of `test_stock_models.py` detect is in docs/decisions.md."""

MORE = [
    Case(taps="none", tensor=2, pipeline=2, sequence_parallel=True, trained="adapters"),
    Case(taps="none", pipeline=4, data=2, tied=True, sync="distributed"),
    *CASES,
    *(Case(**values) for values in covering_array(CONTEXT_SPACE)),
]
PARAMETERS = [pytest.param(case, id=str(case)) for case in NORMAL] + [
    pytest.param(case, id=str(case), marks=pytest.mark.exhaustive) for case in MORE
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


_MODELS = ("policy", "reference")


class OracleRuns:
    """Trainings by the oracle, each computed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[Any, tuple[Any, Any]] = {}
        self._references: dict[Any, list[dict[int, Tensor]]] = {}
        self._runs: dict[Any, dict[str, Any]] = {}

    def directory(self, case: Case) -> Path:
        """The policy's checkpoint."""
        self._models_of(case)
        return self._root / f"policy-{case.tied}-{case.window}"

    def references(self, case: Case) -> list[dict[int, Tensor]]:
        """Per step and layer, the reference's log-probabilities."""
        key = (case.tied, case.window, case.norm)
        if key not in self._references:
            _, reference = self._models_of(case)
            layers = range(1, NUM_LAYERS + 1)
            with torch.no_grad():
                self._references[key] = [
                    oracle.sequence_logps(reference, pairs, layers, norm=case.norm)
                    for pairs in batches_of_pairs()
                ]
        needed = {*case.layers, NUM_LAYERS}
        return [{k: v for k, v in by.items() if k in needed} for by in self._references[key]]

    def run(self, case: Case) -> dict[str, Any]:
        """Losses, gradients of the first step, weights after the last."""
        objective = case.objective_fields
        model = (case.tied, case.window)
        key = (model, case.trained, case.layers, case.norm, *objective.items())
        if key not in self._runs:
            self._runs[key] = oracle.train_steps(
                *self._models_of(case),
                batches_of_pairs(),
                case.layers,
                optimizer="adam",
                lr=LR,
                eps=EPS,
                frozen_head=case.trained != "all",
                trainable=TRAINED[case.trained],
                steps=STEPS,
                norm=case.norm,
                **objective,
            )
        return self._runs[key]

    def _models_of(self, case: Case) -> tuple[Any, Any]:
        """Policy and reference."""
        from transformers import AutoModelForCausalLM

        key = (case.tied, case.window)
        if key not in self._models:
            family, window = "llama", {}
            if case.window is not None:
                family, window = "mistral", {"sliding_window": case.window}
            sizes = {**SIZES, **window, "tie_word_embeddings": case.tied}
            paths = [self._root / f"{name}-{case.tied}-{case.window}" for name in _MODELS]
            for seed, path in enumerate(paths, start=1):
                write_tiny_hf_model(path, family, seed, **sizes)
            policy, reference = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                for path in paths
            )
            self._models[key] = (policy, reference)
        return self._models[key]


@pytest.fixture(scope="session")
def oracle_runs(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are too small for several threads to help
    yield OracleRuns(tmp_path_factory.mktemp("oracle"))
    torch.set_num_threads(threads)


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS)
def test_training_equals_the_oracle(case, workers, oracle_runs, record_property):
    expected, directory = oracle_runs.run(case), str(oracle_runs.directory(case))
    by_rank = workers.run(
        megatron_run, case.world_size, directory, case, oracle_runs.references(case)
    )
    gradients = {n: g for of_rank in by_rank for n, g in of_rank["gradients"].items()}
    weights = {n: w for of_rank in by_rank for n, w in of_rank["weights"].items()}
    assert set(weights) == set(expected["weights"])
    worst = {
        "loss": _worst(_loss_differences(expected, by_rank, case)),
        "gradient": _worst(
            {n: (gradients[n] - g).norm() / g.norm() for n, g in expected["gradients"].items()}
        ),
        "weight in lr": _worst(
            {n: (weights[n] - w).abs().max() / LR for n, w in expected["weights"].items()}
        ),
    }
    for quantity, (difference, _) in worst.items():
        record_property(quantity, difference)
    assert worst["loss"][0] <= LOSS_RELATIVE, worst
    assert worst["gradient"][0] <= GRADIENT_RELATIVE, worst
    assert worst["weight in lr"][0] <= WEIGHT_IN_LR, worst


def _worst(differences: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference and its name; torch treats NaN as the largest."""
    values = torch.stack(list(differences.values()))
    return float(values.max()), list(differences)[int(values.argmax())]


def _loss_differences(
    expected: dict[str, Any], by_rank: list[dict[str, Any]], case: Case
) -> dict[str, Tensor]:
    """A layer's loss is the sum over data ranks; the other ranks of a stage all report the same."""
    differences, copies = {}, case.tensor * case.context
    for step, losses in enumerate(expected["losses"]):
        for layer, loss in losses.by_layer.items():
            of_layer = [r["losses"][step][layer] for r in by_rank if layer in r["losses"][step]]
            assert len(of_layer) == case.data * copies
            mean = torch.stack(of_layer).sum() / copies / PAIRS
            differences[f"step {step} layer {layer}"] = ((mean - loss) / loss).abs()
    return differences


def test_first_layer_of_adapters_gets_gradients_under_every_recompute_method(oracle_runs):
    with_adapters = [case for case in CASES if case.trained == "adapters"]
    assert {case.recompute for case in with_adapters} == set(RECOMPUTE)
    for case in with_adapters[:4]:
        gradients = oracle_runs.run(case)["gradients"]
        assert all(".embed_tokens." not in name and ".norm." not in name for name in gradients)
        assert gradients["model.layers.0.self_attn.q_proj.weight"].norm() > 0


def test_rows_of_a_batch_are_unequal_and_some_are_empty():
    for case in CASES:
        rows = pairs_by_row(case)
        assert len(rows) == case.micro_batches * case.data
        assert sorted(pair for row in rows for pair in row) == list(range(PAIRS))
        sizes = [len(row) for row in rows]
        assert (min(sizes) == 0) == (case.rows == "with_empty")
        assert len(sizes) == 1 or len(set(sizes)) > 1

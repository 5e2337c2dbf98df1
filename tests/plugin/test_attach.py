"""Intermediate DPO on stock schedules equals the oracle, in every layout.

Each case trains three steps by megatron-core's own schedule, gradient reduction and optimizer and
is compared with `tests/oracle.py`: every layer's loss in every step, all gradients of the first
step, all weights after the third. The reference is another model, so that no margin is zero.

The cases are a covering array: every feasible combination of three settings occurs in one of them,
and every combination of two in those that `make test` runs.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.testing import write_tiny_hf_model

from .covering import covering_array, few_that_cover
from .training_case import (
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

# fp32 sums in another order, through 8 layers and a log-softmax.
LOSS_ABSOLUTE = 2e-5
# |difference| / |gradient| per tensor (Frobenius).
GRADIENT_RELATIVE = 1e-5
# Three Adam steps with eps 1e-4, in units of the learning rate.
STEPS_IN_LR = 5e-3

ARRAY = covering_array(SPACE)
QUICK = few_that_cover(ARRAY, 2)
CASES = [Case(**values) for values in ARRAY]
HAND_PICKED = [
    # Plain DPO.
    Case(taps="none"),
    Case(taps="none", tensor=2, pipeline=2, sequence_parallel=True, trained="adapters"),
    Case(taps="none", pipeline=4, data=2, tied=True, sync="distributed"),
    # DDP waits for the gradient of every trainable parameter; a norm that is not read has none.
    Case(pipeline=2, norm="none", sync="overlap"),
]
PARAMETERS = [pytest.param(case, id=str(case)) for case in HAND_PICKED] + [
    pytest.param(case, id=str(case), marks=() if n in QUICK else pytest.mark.exhaustive)
    for n, case in enumerate(CASES)
]


def _load_oracle() -> Any:
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parents[1] / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


# ---- what the oracle says ------------------------------------------------------------------------


class Judge:
    """The oracle's answers, each computed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[bool, tuple[Any, Any]] = {}
        self._references: dict[Any, list[dict[int, Tensor]]] = {}
        self._runs: dict[Any, dict[str, Any]] = {}

    def directory(self, tied: bool) -> Path:
        """The policy's checkpoint."""
        self._pair(tied)
        return self._root / f"policy-{tied}"

    def references(self, case: Case) -> list[dict[int, Tensor]]:
        """Of each step by layer: the reference's log-probabilities."""
        key = (case.tied, case.norm)
        if key not in self._references:
            _, reference = self._pair(case.tied)
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
        key = (case.tied, case.trained, case.layers, case.norm, *objective.items())
        if key not in self._runs:
            self._runs[key] = oracle.train_steps(
                *self._pair(case.tied),
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

    def _pair(self, tied: bool) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        if tied not in self._models:
            paths = [self._root / f"{name}-{tied}" for name in ("policy", "reference")]
            for seed, path in enumerate(paths, start=1):
                write_tiny_hf_model(path, "llama", seed, tie_word_embeddings=tied, **SIZES)
            policy, reference = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                for path in paths
            )
            self._models[tied] = (policy, reference)
        return self._models[tied]


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in matrices this small
    yield Judge(tmp_path_factory.mktemp("judge"))
    torch.set_num_threads(threads)


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS)
def test_training_equals_the_oracle(case, workers, judge, record_property):
    run, directory = judge.run(case), str(judge.directory(case.tied))
    answers = workers.run(megatron_run, case.world_size, directory, case, judge.references(case))
    gradients = {n: g for answer in answers for n, g in answer["gradients"].items()}
    weights = {n: w for answer in answers for n, w in answer["weights"].items()}
    assert set(weights) == set(run["weights"])
    learning = run["gradients"]
    worst = {
        "loss": _worst(_loss_differences(run, answers, case)),
        "gradient": _worst(
            {name: (gradients[name] - g).norm() / g.norm() for name, g in learning.items()}
        ),
        "weight in lr": _worst(
            {name: (weights[name] - w).abs().max() / LR for name, w in run["weights"].items()}
        ),
    }
    for what, (difference, _) in worst.items():
        record_property(what, difference)
    assert worst["loss"][0] <= LOSS_ABSOLUTE, worst
    assert worst["gradient"][0] <= GRADIENT_RELATIVE, worst
    assert worst["weight in lr"][0] <= STEPS_IN_LR, worst


def _worst(differences: dict[str, Tensor]) -> tuple[float, str]:
    """The largest, and where it is; torch takes NaN for the largest of all."""
    values = torch.stack(list(differences.values()))
    return float(values.max()), list(differences)[int(values.argmax())]


def _loss_differences(
    run: dict[str, Any], answers: list[dict[str, Any]], case: Case
) -> dict[str, Tensor]:
    """Each layer's loss is its pairs' sum over data ranks; tensor ranks say the same."""
    differences = {}
    for step, truth in enumerate(run["losses"]):
        for layer, loss in truth.by_layer.items():
            spoken = [a["losses"][step][layer] for a in answers if layer in a["losses"][step]]
            assert len(spoken) == case.data * case.tensor
            total = torch.stack(spoken).sum() / case.tensor / PAIRS
            differences[f"step {step} layer {layer}"] = (total - loss).abs()
    return differences


def test_adapters_of_layer_1_are_compared_under_every_recomputation(judge):
    for cases in (CASES, [CASES[n] for n in QUICK]):
        with_adapters = [case for case in cases if case.trained == "adapters"]
        assert {case.recompute for case in with_adapters} == set(RECOMPUTE)
    for case in with_adapters:
        gradients = judge.run(case)["gradients"]
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

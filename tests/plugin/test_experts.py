"""Intermediate DPO on a mixture of experts equals the oracle, in layouts with expert parallelism.

As `test_attach.py`. The load-balancing loss, which the oracle lacks, is computed here from
Transformers' router logits, one sequence after another: it knows neither rows nor ranks.
"""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model
from tests import oracle
from tests.convert.test_expert_parity import stored_names

from .test_attach import (
    GRADIENT_RELATIVE,
    LOSS_RELATIVE,
    SIZES,
    WEIGHT_IN_LR,
    _loss_differences,
    _worst,
)
from .training_case import EPS, LR, NUM_LAYERS, STEPS, Case, Tokens, batches_of_pairs
from .training_run import megatron_run

EXPERTS, TOPK = 8, 2
DENSE = [0, 1]
"""Layers without experts: the whole first of two pipeline stages. Mixtral has experts in all."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": DENSE,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "mlp_only_layers": DENSE,
        "decoder_sparse_step": 1,
    },
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 16},
}

BALANCE_RELATIVE = 1e-5
"""fp32 sums of probabilities in another order."""


@dataclass(frozen=True, kw_only=True)
class ExpertCase(Case):
    """A training with experts."""

    expert: int = 1
    expert_tensor: int | None = None
    router_aux_loss: float = 0.0
    family: str = "qwen2_moe"

    @property
    def dense(self) -> list[int]:
        """Layers without experts, from 0."""
        return FAMILIES[self.family].get("mlp_only_layers", [])

    def __str__(self) -> str:
        name = f"EP{self.expert}-ETP{self.expert_tensor or self.tensor}-{super().__str__()}"
        return f"{self.family}-{name}-aux{self.router_aux_loss:g}"

    @property
    def layout(self) -> Layout:
        experts = {"expert": self.expert, "expert_tensor": self.expert_tensor}
        return super().layout.model_copy(update=experts)


NORMAL = [
    ExpertCase(data=2, expert=2, taps="three", rows="with_empty", router_aux_loss=0.1),
    ExpertCase(
        tensor=2, sequence_parallel=True, expert=2, expert_tensor=1, pipeline=2, recompute="block"
    ),
    ExpertCase(context=2, expert=2, rows="with_empty", router_aux_loss=0.1),
]
TP2 = {"tensor": 2, "sequence_parallel": True}
MORE = [
    ExpertCase(),
    ExpertCase(router_aux_loss=0.1, recompute="uniform", loss_scale=1024.0),
    ExpertCase(**TP2, router_aux_loss=0.1, rows="with_empty"),
    ExpertCase(**TP2, data=2, expert=4, expert_tensor=1, router_aux_loss=0.1, recompute="block"),
    ExpertCase(**TP2, data=2, expert=2, sync="distributed", router_aux_loss=0.1),
    ExpertCase(pipeline=2, data=2, expert=2, virtual=2, router_aux_loss=0.1, sync="overlap"),
    ExpertCase(data=4, expert=2, sync="distributed_aligned", accumulation="few"),
    ExpertCase(data=4, expert=4, recompute="selective", objective="ipo"),
    ExpertCase(context=2),
    ExpertCase(context=4, router_aux_loss=0.1, recompute="uniform"),
    ExpertCase(context=2, expert=2, pipeline=2, recompute="block"),
    ExpertCase(**TP2, context=2, expert=2, router_aux_loss=0.1, rows="with_empty"),
    ExpertCase(context=2, data=2, expert=4, router_aux_loss=0.1, sync="distributed"),
    *(
        ExpertCase(family=family, **fields)
        for family in ("qwen3_moe", "mixtral")
        for fields in (
            {"data": 2, "expert": 2, "rows": "with_empty", "router_aux_loss": 0.1},
            {**TP2, "expert": 2, "expert_tensor": 1, "pipeline": 2, "recompute": "block"},
            {"context": 2, "expert": 2, "recompute": "selective"},
        )
    ),
]
PARAMETERS = [pytest.param(case, id=str(case)) for case in NORMAL] + [
    pytest.param(case, id=str(case), marks=pytest.mark.exhaustive) for case in MORE
]


def balance_losses(model: Any, pairs: list[Tokens]) -> Tensor:
    """The load-balancing loss of each layer with experts, as a mean over the pairs."""
    by_pair = []
    for prompt, chosen, rejected in pairs:
        first, second = (
            model(torch.tensor([[*prompt, *answer]]), output_router_logits=True).router_logits
            for answer in (chosen, rejected)
        )
        by_layer = []
        for of_chosen, of_rejected in zip(first, second, strict=True):
            scores_NE = torch.cat([of_chosen, of_rejected[len(prompt) :]]).softmax(dim=-1)
            chosen = scores_NE.topk(TOPK).indices.flatten()
            tokens_E = torch.bincount(chosen, minlength=EXPERTS)
            size = EXPERTS / TOPK / len(scores_NE) ** 2
            by_layer.append(size * (tokens_E * scores_NE.sum(dim=0)).sum())
        by_pair.append(torch.stack(by_layer))
    return torch.stack(by_pair).mean(dim=0)


class Models:
    """Policy and reference, and trainings by the oracle."""

    def __init__(self, root: Path, family: str) -> None:
        from transformers import AutoModelForCausalLM

        self.family = family
        self.directories = [root / name for name in ("policy", "reference")]
        sizes = {**SIZES, **FAMILIES[family]}
        for seed, path in enumerate(self.directories, start=1):
            write_tiny_hf_model(path, family, seed, num_experts_per_tok=TOPK, **sizes)
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in self.directories
        )

    def references(self, case: ExpertCase) -> list[dict[int, Tensor]]:
        """Per step; with the load-balancing loss, whose truth is slow, there is one step."""
        layers = {*case.layers, NUM_LAYERS}
        steps = 1 if case.router_aux_loss else STEPS
        with torch.no_grad():
            return [
                oracle.sequence_logps(self.reference, pairs, layers, norm=case.norm)
                for pairs in batches_of_pairs()[:steps]
            ]

    def run(self, case: ExpertCase) -> dict[str, Any]:
        if not case.router_aux_loss:
            settings = {"optimizer": "adam", "lr": LR, "eps": EPS, "steps": STEPS}
            run = oracle.train_steps(
                self.policy,
                self.reference,
                batches_of_pairs(),
                case.layers,
                norm=case.norm,
                **settings,
                **case.objective_fields,
            )
        else:
            run = self._run_with_balance(case)
        for kind in ("gradients", "weights"):
            run[kind] = stored_names(run[kind], self.family)
        return run

    def _run_with_balance(self, case: ExpertCase) -> dict[str, Any]:
        policy = copy.deepcopy(self.policy)
        adam = torch.optim.Adam(policy.parameters(), lr=LR, eps=EPS)
        run: dict[str, Any] = {"losses": []}
        layers = [*case.layers, NUM_LAYERS]
        references = self.references(case)
        for step, (pairs, reference) in enumerate(
            zip(batches_of_pairs(), references, strict=False)
        ):
            logps = oracle.sequence_logps(policy, pairs, layers, case.norm)
            result = oracle.losses(logps, reference, pairs, case.layers, **case.objective_fields)
            balance_L = balance_losses(policy, pairs)
            adam.zero_grad()
            (result.total + case.router_aux_loss * balance_L.sum()).backward()
            if step == 0:
                run["balance"] = balance_L.detach()
                run["gradients"] = {n: p.grad.clone() for n, p in policy.named_parameters()}
            adam.step()
            by_layer = {layer: loss.detach() for layer, loss in result.by_layer.items()}
            run["losses"].append(result._replace(by_layer=by_layer))
        return run | {"weights": {n: p.detach() for n, p in policy.named_parameters()}}


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cache(lambda family: Models(tmp_path_factory.mktemp(family), family))
    torch.set_num_threads(threads)


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS)
def test_training_equals_the_oracle(case, workers, models_of):
    models = models_of(case.family)
    expected = models.run(case)
    by_rank = workers.run(
        megatron_run, case.world_size, str(models.directories[0]), case, models.references(case)
    )
    gradients = {n: g for of_rank in by_rank for n, g in of_rank["gradients"].items()}
    weights = {n: w for of_rank in by_rank for n, w in of_rank["weights"].items()}
    assert set(weights) == set(expected["weights"])
    losses = _worst(_loss_differences(expected, by_rank, case))
    gradient = _worst(
        {n: (gradients[n] - g).norm() / g.norm() for n, g in expected["gradients"].items()}
    )
    weight = _worst({n: (weights[n] - w).abs().max() / LR for n, w in expected["weights"].items()})
    assert losses[0] <= LOSS_RELATIVE, losses
    assert gradient[0] <= GRADIENT_RELATIVE, gradient
    assert weight[0] <= WEIGHT_IN_LR, weight
    _check_statistics(case, by_rank, expected)


def _check_statistics(
    case: ExpertCase, by_rank: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    """Every token of the pairs is counted once, padding never; the logged loss is the true one."""
    table = sum(answer["router"] for answer in by_rank)
    num_tokens = sum(len(part) for pair in batches_of_pairs()[0] for part in pair)
    per_layer = [0 if layer in case.dense else TOPK * num_tokens for layer in range(NUM_LAYERS)]
    assert table[:, :-1].sum(dim=1).tolist() == per_layer
    if case.router_aux_loss:
        balance_L, ours_L = expected["balance"].double(), table[len(case.dense) :, -1]
        assert ((ours_L - balance_L).abs() / balance_L).max() <= BALANCE_RELATIVE
    else:
        assert not table[:, -1].any()

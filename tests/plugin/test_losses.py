"""Every loss with a tap on two pipeline stages: the gradients are those of plain autograd.

The losses are compared with TRL's in `tests/objective`. Here the oracle's log-probabilities of a
whole batch and one call of `layer_loss` at each layer are compared with micro-batches on stages:
the scales, the values of the whole batch, and WPO's second read of the head.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.testing import write_tiny_hf_model
from tests import oracle

from .test_attach import GRADIENT_RELATIVE, LOSS_RELATIVE, SIZES
from .training_case import LOSSES, NUM_LAYERS, PAIRS, Case, batches_of_pairs
from .training_run import megatron_run

SORTED = ("aot", "aot_unpaired")


def _case(objective: str) -> Case:
    accumulation = "few" if objective in SORTED else "many"
    return Case(pipeline=2, taps="two_on_a_stage", objective=objective, accumulation=accumulation)


NORMAL = [
    _case("mpo"),
    _case("aot"),
    Case(tensor=2, sequence_parallel=True, taps="middle", objective="wpo"),
]
MORE = [_case(objective) for objective in LOSSES if objective not in ("mpo", "aot")]
PARAMETERS = [pytest.param(case, id=f"{case.objective}-PP{case.pipeline}") for case in NORMAL] + [
    # A training on two processes for each loss.
    pytest.param(case, id=case.objective, marks=pytest.mark.exhaustive)
    for case in MORE
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference."""
    root = tmp_path_factory.mktemp("losses")
    paths = (root / "policy", root / "reference")
    for seed, path in enumerate(paths, start=1):
        write_tiny_hf_model(path, "llama", seed, **SIZES)
    return paths


def _logps(model: Any, case: Case) -> dict[int, Tensor]:
    return oracle.sequence_logps(model, batches_of_pairs()[0], (*case.layers, NUM_LAYERS))


def _at_half_temperature(model: Any) -> Any:
    """A copy with twice the logits."""
    sharpened = copy.deepcopy(model)
    sharpened.lm_head.weight.data *= 2
    return sharpened


def _autograd(
    policy: Any, reference: dict[int, Tensor], case: Case
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Each layer's mean loss, and the gradients of all parameters."""
    objective = Objective(**case.objective_fields)
    lengths_2P = torch.tensor([len(y) for _, *both in batches_of_pairs()[0] for y in both])
    with torch.no_grad():
        sharpened = _logps(_at_half_temperature(policy), case)
    losses = {
        layer: layer_loss(
            logps_2P, reference[layer], lengths_2P, objective, sharpened_logps_2P=sharpened[layer]
        ).mean()
        for layer, logps_2P in _logps(policy, case).items()
    }
    final_scale, scales = objective.layer_scales(len(case.layers))
    policy.zero_grad()
    sum(
        scale * losses[layer]
        for layer, scale in zip((*case.layers, NUM_LAYERS), (*scales, final_scale), strict=True)
    ).backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters()}
    return {layer: loss.detach() for layer, loss in losses.items()}, gradients


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS)
def test_gradients_are_those_of_the_whole_batch(case, workers, directories):
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in directories
    )
    with torch.no_grad():
        reference_logps = _logps(reference, case)
    losses, gradients = _autograd(policy, reference_logps, case)
    by_rank = workers.run(
        megatron_run, case.world_size, str(directories[0]), case, [reference_logps]
    )
    ours = {name: value for rank in by_rank for name, value in rank["gradients"].items()}
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= GRADIENT_RELATIVE * gradient.norm(), name
    for layer, loss in losses.items():
        (sums, *_) = [rank["losses"][0][layer] for rank in by_rank if layer in rank["losses"][0]]
        assert abs(sums / PAIRS - loss) <= LOSS_RELATIVE * abs(loss), layer


@pytest.mark.distributed
def test_what_a_micro_batch_cannot_know_is_refused(workers, directories):
    case = Case(taps="none", objective="aot")
    reference = {NUM_LAYERS: torch.zeros(2 * PAIRS)}
    message = f"aot.* compares sorted values of all {PAIRS} pairs of a global batch, of which micro"
    with pytest.raises(ConfigError, match=message):
        workers.run(megatron_run, 1, str(directories[0]), case, [reference])

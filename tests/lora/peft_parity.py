"""Compares a training with megatron-core with the same training with PEFT."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from .lora_case import ADAM, CLIP, NUM_SEQUENCES, STEPS, Case
from .lora_run import merged

LOGITS_ABSOLUTE = 1e-5
"""fp32 sums in another order, on logits of order 1."""

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| (Frobenius), of gradients and their norm."""

STEP_IN_LR = 2e-3
"""Weights per Adam step (eps 1e-4 limits tiny gradients), in units of the learning rate."""


def assert_equals_peft(
    by_rank: Sequence[Mapping[str, Any]], expected: Mapping[str, Any], case: Case
) -> None:
    """Logits, gradients, norms and trained adapters of `lora_run.train` on every rank."""
    logits = merged([of_rank["logits"] for of_rank in by_rank])
    whole_logits = torch.cat([logits[index] for index in range(NUM_SEQUENCES)])
    assert (whole_logits - expected["logits"]).abs().max() <= LOGITS_ABSOLUTE
    if case.sync != "distributed":  # then each rank has only a part of the gradients
        gradients = merged([of_rank["gradients"] for of_rank in by_rank])
        assert gradients.keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            relative = (gradients[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"
    for norms in (of_rank["norms"] for of_rank in by_rank):
        assert norms == pytest.approx(expected["norms"], rel=GRADIENT_RELATIVE)
    assert min(expected["norms"]) > 2 * CLIP
    trained = merged([of_rank["adapters"] for of_rank in by_rank])
    assert trained.keys() == expected["adapters"].keys()
    for name, tensor in expected["adapters"].items():
        difference = (trained[name] - tensor).abs().max() / ADAM["lr"]
        assert difference <= STEP_IN_LR * STEPS, f"{name}: {difference:.2e} lr"

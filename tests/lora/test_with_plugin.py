"""Adapters with tapped layers have the same gradients on one stage and on several."""

from typing import Any

import pytest
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.objective.dpo import Objective

from ..plugin import tiny_megatron as tiny
from .lora_run import merged

pytestmark = pytest.mark.distributed

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| per tensor (Frobenius): fp32 sums in another order."""

TAPS = [1, 3]
SETTINGS = LoraConfig(rank=2)


def gradients(layout: Layout, tied: bool, recompute: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of this rank's adapters after a step with two taps; B is not zero."""
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.plugin.attach import attach
    from megatron_idpo.testing import tiny_hf_config

    config = tiny_hf_config("llama", tie_word_embeddings=tied, **tiny.SIZES)
    chunks = tiny.start(layout, tied=tied, **recompute)
    adapters = add_adapters(chunks, Architecture.from_hf(config), SETTINGS)
    for name, parameter in adapters.parameters():
        parameter.data.copy_(tiny.weight_of(name, parameter, tied=False))
    dpo = attach(chunks, layers=TAPS, objective=Objective(), vocab_size=tiny.VOCAB)
    wrapped = tiny.wrap(dpo, chunks)
    tiny.run(dpo, wrapped, tiny.micro_batches(tiny.references([*TAPS, tiny.NUM_LAYERS])))
    return {name: parameter.main_grad.clone() for name, parameter in adapters.parameters()}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_on_several_stages_equal_one_stage(tied, workers):
    expected = workers.run(gradients, 1, Layout(), tied, {})[0]
    assert len(expected) == tiny.NUM_LAYERS * 7 * 2 and all(g.any() for g in expected.values())
    for layout, recompute in (
        (Layout(pipeline=2), FULL),
        (Layout(pipeline=2, virtual_pipeline=2), {}),
    ):
        staged = merged(workers.run(gradients, 2, layout, tied, recompute))
        assert staged.keys() == expected.keys()
        for name, gradient in expected.items():
            relative = (staged[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"

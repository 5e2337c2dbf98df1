"""Adapters under the plugin's taps: the same gradients on one stage and on several."""

from typing import Any

import pytest
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.objective.dpo import Objective

from ..plugin import tiny_megatron as tiny
from .lora_run import merged

pytestmark = pytest.mark.distributed

# fp32 sums in another order, as |difference| / |gradient| per tensor (Frobenius).
GRADIENT_RELATIVE = 1e-5

TAPS = [1, 3]
SETTINGS = LoraConfig(rank=2)


def gradients(layout: Layout, tied: bool, recompute: dict[str, Any]) -> dict[str, Tensor]:
    """Of all adapters of this rank, after a step with two taps; B is not zero."""
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
    dpo.take_outputs(len(tiny.PAIRS_BY_ROW))
    return {name: parameter.main_grad.clone() for name, parameter in adapters.parameters()}


FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.mark.parametrize("tied", [True, False])
def test_stages_learn_what_one_learns(tied, workers):
    alone = workers.run(gradients, 1, Layout(), tied, {})[0]
    assert len(alone) == tiny.NUM_LAYERS * 7 * 2 and all(one.any() for one in alone.values())
    for layout, recompute in (
        (Layout(pipeline=2), FULL),
        (Layout(pipeline=2, virtual_pipeline=2), {}),
    ):
        staged = merged(workers.run(gradients, 2, layout, tied, recompute))
        assert staged.keys() == alone.keys()
        for name, gradient in alone.items():
            relative = (staged[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"

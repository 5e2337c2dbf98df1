"""Layer specs: our attention and norm in every layer, and the norm's arithmetic and attributes."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

# fp32 against the same formula in fp64.
NORM_RELATIVE = 1e-6


def norm_answers(sequence_parallel: bool, eps: float) -> tuple[Any, ...]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_idpo.mcore.model.specs import RMSNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.bfloat16,
    )
    norm = RMSNorm(config, 8, eps)
    attribute = norm.weight.sequence_parallel
    dtypes = norm.weight.dtype, norm(torch.ones(3, 1, 8, dtype=torch.bfloat16)).dtype
    norm = norm.float()
    norm.weight.data = torch.linspace(0.5, 1.5, 8)
    hidden = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    return attribute, dtypes, hidden, norm(hidden).detach()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_norm(sequence_parallel, workers):
    eps = 1e-5  # of the size of the mean square, so that it counts
    ((attribute, dtypes, hidden, found),) = workers.run(norm_answers, 1, sequence_parallel, eps)
    assert attribute is sequence_parallel
    assert dtypes == (torch.bfloat16, torch.bfloat16)
    wide = hidden.double()
    root = (wide.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    expected = wide / root * torch.linspace(0.5, 1.5, 8).double()
    assert ((found - expected) / expected).abs().max() <= NORM_RELATIVE


def layer_modules(family: str, layout: Layout) -> list[list[tuple[str, ...]]]:
    """For each chunk, each layer's module types, and the final norm's."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(layout)
    chunks = build_model(Architecture.from_hf(tiny_hf_config(family)), layout)
    message = []
    for chunk in chunks:
        layers = [
            tuple(
                type(module).__name__
                for module in (
                    layer.input_layernorm,
                    layer.pre_mlp_layernorm,
                    layer.self_attention.core_attention,
                    layer.self_attention.q_layernorm,
                    layer.self_attention.k_layernorm,
                )
            )
            for layer in chunk.decoder.layers
        ]
        final = chunk.decoder.final_layernorm
        message.append([*layers, (type(final).__name__,)])
    return message


NONE = "NoneType"


@pytest.mark.parametrize(("family", "qk_norm"), [("llama", NONE), ("qwen3", "RMSNorm")])
def test_every_layer_has_our_attention_and_norms(family, qk_norm, workers):
    layout = Layout(pipeline=2, virtual_pipeline=2)
    layer = ("RMSNorm", "RMSNorm", "RowAttention", qk_norm, qk_norm)
    first, last = workers.run(layer_modules, 2, family, layout)
    assert first == [[layer, (NONE,)], [layer, (NONE,)]]
    assert last == [[layer, (NONE,)], [layer, ("RMSNorm",)]]


def shared_instances() -> bool:
    """Whether megatron-core's own spec still has its own modules after ours was made of it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules

    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, transformer_config
    from megatron_idpo.mcore.model.specs import block_spec
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    architecture = Architecture.from_hf(tiny_hf_config("qwen3"))
    config = transformer_config(architecture, layout, ModelOptions())
    block_spec(config, vp_stage=None)
    stock = get_gpt_layer_local_submodules(qk_layernorm=True, normalization="RMSNorm")
    attention = stock.self_attention.submodules
    names = [str(attention.core_attention), str(attention.q_layernorm), str(stock.input_layernorm)]
    return not any("RowAttention" in name or "megatron_idpo" in name for name in names)


def test_megatron_cores_own_specs_are_left_alone(workers):
    assert workers.run(shared_instances, 1) == [True]


def implementations() -> list[tuple[str, str]]:
    """With and without `ModelOptions.transformer_engine`, as if it were there and could run."""
    from unittest.mock import patch

    from megatron_idpo.mcore.model import build as model
    from megatron_idpo.mcore.model import specs
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    architecture = Architecture.from_hf(tiny_hf_config("llama"))
    found = []
    with (
        patch.object(model, "has_transformer_engine", lambda: True),
        patch.object(specs, "has_transformer_engine", lambda: True),
        patch.object(specs, "LayerNormImpl", lambda **_: torch.nn.Identity()),
    ):
        for wanted in (True, False):
            options = model.ModelOptions(transformer_engine=wanted)
            config = model.transformer_config(architecture, layout, options)
            norm = type(specs.final_norm(config)).__name__
            found.append((config.transformer_impl, norm))
    return found


def test_transformer_engine_can_be_left_aside(workers):
    """Layers and the copies of their final norm alike."""
    (found,) = workers.run(implementations, 1)
    assert found == [("transformer_engine", "Identity"), ("local", "RMSNorm")]

"""Layer specs: our attention, norm and activation in every layer; what norm and SwiGLU compute."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from megatron_idpo.config.layout import Layout
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.testing import tiny_hf_config

with suppress_megatron_warnings():
    from megatron_idpo.mcore.model import specs
    from megatron_idpo.mcore.model.specs import SwiGLU

NORM_RELATIVE = 1e-6
"""fp32 against the same formula in fp64."""

SWIGLU_RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
"""Relative to the largest value: one or two roundings of the dtype."""


# --- RMSNorm ----------------------------------------------------------------------------------


def norm_outputs(sequence_parallel: bool, eps: float) -> tuple[Any, ...]:
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


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rms_norm_matches_the_formula_and_marks_its_weight(sequence_parallel, workers):
    eps = 1e-5  # about the mean square of the input, so that an error in eps shows
    ((attribute, dtypes, hidden, output),) = workers.run(norm_outputs, 1, sequence_parallel, eps)
    assert attribute is sequence_parallel
    assert dtypes == (torch.bfloat16, torch.bfloat16)
    hidden = hidden.double()
    root = (hidden.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    expected = hidden / root * torch.linspace(0.5, 1.5, 8).double()
    assert ((output - expected) / expected).abs().max() <= NORM_RELATIVE


# --- SwiGLU -----------------------------------------------------------------------------------


def activation_config(**changes):
    fields = {
        "gated_linear_unit": True,
        "activation_func": silu,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
    }
    return SimpleNamespace(**fields | changes)


def autograd_swiglu(fused):
    gate, up = fused.chunk(2, dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize("dtype", SWIGLU_RELATIVE)
@pytest.mark.parametrize("block_elements", [1, 40, 1 << 17])
def test_swiglu_matches_autograd(dtype, block_elements, monkeypatch):
    monkeypatch.setattr(specs, "_SWIGLU_BLOCK_ELEMENTS", block_elements)
    torch.manual_seed(0)
    ours = torch.randn(7, 1, 24, dtype=dtype).mul_(3).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    grad = torch.randn(7, 1, 12, dtype=dtype)
    swiglu = SwiGLU(activation_config())
    swiglu(ours).backward(grad)
    autograd_swiglu(reference).backward(grad)
    for actual, expected in (
        (swiglu(ours), autograd_swiglu(reference)),
        (ours.grad, reference.grad),
    ):
        worst = (actual - expected).abs().max() / expected.abs().max()
        assert actual.dtype == dtype and worst <= SWIGLU_RELATIVE[dtype]


def test_swiglu_backward_accepts_a_noncontiguous_gradient():
    fused = torch.randn(6, 1, 8, dtype=torch.float64, requires_grad=True)
    swiglu = SwiGLU(activation_config())
    assert torch.autograd.gradcheck(lambda x: swiglu(x).transpose(0, 2), fused)


def test_swiglu_keeps_only_its_input_for_backward():
    kept = []
    fused = torch.randn(5, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU(activation_config())(fused)
    assert [tensor.data_ptr() for tensor in kept] == [fused.data_ptr()]


@pytest.mark.parametrize("change", [{"glu_linear_offset": 1.0}, {"gated_linear_unit": False}])
def test_swiglu_rejects_another_activation(change):
    with pytest.raises(AssertionError):
        SwiGLU(activation_config(**change))


# --- specs ------------------------------------------------------------------------------------


def layer_module_types(family: str, layout: Layout) -> list[list[tuple[str, ...]]]:
    """For each chunk: the module types of each layer, then of the final norm."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(layout)
    chunks = build_model(Architecture.from_hf(tiny_hf_config(family)), layout)
    types_by_chunk = []
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
        types_by_chunk.append([*layers, (type(final).__name__,)])
    return types_by_chunk


NONE = "NoneType"


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "qk_norm"), [("llama", NONE), ("qwen3", "RMSNorm")])
def test_every_layer_has_our_attention_and_norms(family, qk_norm, workers):
    layout = Layout(pipeline=2, virtual_pipeline=2)
    layer = ("RMSNorm", "RMSNorm", "RowAttention", qk_norm, qk_norm)
    first, last = workers.run(layer_module_types, 2, family, layout)
    assert first == [[layer, (NONE,)], [layer, (NONE,)]]
    assert last == [[layer, (NONE,)], [layer, ("RMSNorm",)]]


def stock_spec_is_unchanged() -> bool:
    """Whether megatron-core's spec keeps its modules after `block_spec` derived ours from it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules

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


@pytest.mark.distributed
def test_stock_megatron_specs_are_not_modified(workers):
    assert workers.run(stock_spec_is_unchanged, 1) == [True]


def implementations() -> list[tuple[str, str]]:
    """`transformer_impl` and the final norm, with and without `ModelOptions.transformer_engine`.

    Transformer Engine is faked: present, and usable.
    """
    from unittest.mock import patch

    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_idpo.mcore.model import build, specs
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    architecture = Architecture.from_hf(tiny_hf_config("llama"))
    implementations = []
    with (
        patch.object(build, "has_transformer_engine", lambda: True),
        patch.object(specs, "has_transformer_engine", lambda: True),
        patch.object(specs, "_te_layer", lambda *arguments: ModuleSpec(TransformerLayer)),
        patch.object(specs, "LayerNormImpl", torch.nn.Identity),
    ):
        for transformer_engine in (True, False):
            options = build.ModelOptions(transformer_engine=transformer_engine)
            config = build.transformer_config(architecture, layout, options)
            norm = specs.block_spec(config, vp_stage=None).layer_norm
            implementations.append((config.transformer_impl, norm.__name__))
    return implementations


@pytest.mark.distributed
def test_transformer_engine_option_selects_layers_and_final_norm(workers):
    (selected,) = workers.run(implementations, 1)
    assert selected == [("transformer_engine", "Identity"), ("local", "RMSNorm")]

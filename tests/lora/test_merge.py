"""Merged exports, loaded by Transformers, equal PEFT's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_idpo.config.layout import Layout

from .conftest import hf_model
from .lora_case import SETTINGS, tokens
from .lora_run import adapted

pytestmark = pytest.mark.distributed

LOGITS_ABSOLUTE = 1e-5
"""The merged weight is rounded once; unmerged adapters round elsewhere."""

TP1, PP2_VP2 = Layout(), Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)


def export(base: str, adapter: str, layout: Layout, settings: str, target: str) -> None:
    """Export merged weights to `target/merged` and the base model to `target/base`."""
    from megatron_idpo.convert.hf_to_megatron import open_hf
    from megatron_idpo.convert.megatron_to_hf import export_hf
    from megatron_idpo.lora.adapters import merged_value

    chunks, architecture, adapters = adapted(base, layout, SETTINGS[settings], adapter)
    companions, dtype = open_hf(Path(base))[0].companions, torch.float32
    value = merged_value(adapters)
    export_hf(chunks, architecture, companions, Path(target, "merged"), dtype=dtype, value=value)
    export_hf(chunks, architecture, companions, Path(target, "base"), dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "model", "settings"),
    [
        (TP1, "qwen2", "all"),
        (TP2_PP2_SP, "qwen3", "all"),
        (PP2_VP2, "llama-tied", "k-o-up"),
        (TP2_PP2_SP, "qwen3-moe", "experts"),
    ],
)
def test_merged_export_equals_the_adapted_model(
    layout, model, settings, workers, base_model, peft_adapter, peft_result, tmp_path
):
    base, adapter = base_model(model), peft_adapter(model, settings)
    arguments = (str(base), str(adapter), layout, settings, str(tmp_path))
    workers.run(export, layout.model_ranks, *arguments)
    merged = hf_model(tmp_path / "merged")
    with torch.no_grad():
        logits = merged(tokens(merged.config.vocab_size, 0)[:, :-1]).logits
    assert (logits - peft_result(model, settings)["logits"]).abs().max() <= LOGITS_ABSOLUTE
    # Merging for an export does not change the model's weights.
    unchanged = load_file(tmp_path / "base" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert unchanged.keys() == original.keys()
    assert all(torch.equal(original[name], tensor) for name, tensor in unchanged.items())


FP32_SHARE = 1e-3
"""Rounding a thousandth of a change next to its weight in fp32."""


def merged_in_16_bits(base: str, adapter: str) -> list[tuple[str, Any, Any]]:
    """For each adapted linear: its name, the merged weight and the exact sum."""
    from megatron_idpo.lora.adapters import merged_value

    _, _, adapters = adapted(base, TP1, SETTINGS["all"], adapter, dtype=torch.bfloat16)
    value = merged_value(adapters)
    weights = []
    for _, name, adapted_linear in adapters.by_chunk[0].linears():
        added = adapted_linear.fused_up().double() @ adapted_linear.fused_down().double()
        weight = adapted_linear.linear.weight
        exact = weight.double() + adapted_linear.hyperparams.scaling * added
        weights.append((name, value(weight).detach(), exact.detach()))
    norm = adapters.chunks[0].decoder.final_layernorm.weight
    assert value(norm) is not None and torch.equal(value(norm), norm)
    return weights


def test_bf16_weights_are_rounded_once(workers, base_model, peft_adapter):
    """Within half a unit in the last place of the exact sum, plus fp32 rounding."""
    arguments = (str(base_model("llama-tied")), str(peft_adapter("llama-tied")))
    (weights,) = workers.run(merged_in_16_bits, 1, *arguments)
    assert len(weights) == 4 * 4
    for name, merged, exact in weights:
        assert merged.dtype == torch.bfloat16
        half_ulp = exact.abs() * 2**-8
        assert ((merged.double() - exact).abs() <= half_ulp * 1.001 + 1e-7).all(), name


def shares_by_size_of_change(base: str, adapter: str) -> list[tuple[float, float]]:
    """What remains in bf16 and in fp32 of the adapters' change, and of a thousandth of it."""
    from megatron_idpo.lora.adapters import surviving_share

    _, _, adapters = adapted(base, TP1, SETTINGS["all"], adapter, dtype=torch.bfloat16)
    shares = []
    for factor in (1.0, 0.001):
        with torch.no_grad():
            for tensor in adapters.tensors():
                if tensor.side == "B":
                    tensor.parameter.mul_(factor)
        shares.append(
            (surviving_share(adapters, torch.bfloat16), surviving_share(adapters, torch.float32))
        )
    return shares


def test_small_changes_are_lost_in_weights_of_16_bits(workers, base_model, peft_adapter):
    arguments = (str(base_model("llama-tied")), str(peft_adapter("llama-tied")))
    (((large, large_fp32), (small, small_fp32)),) = workers.run(
        shares_by_size_of_change, 1, *arguments
    )
    assert large > 0.98 > 0.5 > small
    assert large_fp32 == pytest.approx(1, abs=FP32_SHARE)
    assert small_fp32 == pytest.approx(1, abs=FP32_SHARE)

"""Model FLOPs, compared with torch's count for a Transformers model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import Pair
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.testing import tiny_hf_config
from megatron_idpo.train.metrics.flops import BatchWork, ModelFlops, attended_keys, lora_weights

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)
ARCHITECTURE = Architecture.from_hf(CONFIG.to_dict())
TOKENS = 24
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Torch counts attention without a mask, and the head at every position.
WHOLE_ROW = BatchWork(
    pairs=1, used_tokens=TOKENS, computed_tokens=TOKENS, response_tokens=TOKENS,
    attended=CONFIG.num_hidden_layers * TOKENS**2,
)  # fmt: skip


def torch_flops(trained: bool, model: Any = None) -> tuple[int, int]:
    """Torch's count of a forward pass, and of forward and backward, with weights trained or not."""
    if model is None:
        model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    model.requires_grad_(trained)
    embedded = model.get_input_embeddings()(torch.arange(TOKENS)[None]).detach().requires_grad_()
    totals = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = model(inputs_embeds=embedded).logits.sum()
            if backward:
                loss.backward()
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


ROTARY_SHARE = 0.002
"""Transformers computes rotary angles by a matrix product, which we do not count."""


def test_full_training_flops_equal_torch():
    _, step = torch_flops(trained=True)
    flops = ModelFlops(architecture=ARCHITECTURE, num_heads=1)
    assert flops.step(WHOLE_ROW) == pytest.approx(step, rel=ROTARY_SHARE)


def test_frozen_weights_have_no_weight_gradient_flops():
    forward, step = torch_flops(trained=False)
    flops = ModelFlops(architecture=ARCHITECTURE, num_heads=1, adapter_weights=0)
    assert flops.step(WHOLE_ROW) == pytest.approx(step, rel=ROTARY_SHARE)
    with_reference = replace(flops, reference_forwards=1)
    assert with_reference.step(WHOLE_ROW) == pytest.approx(step + forward, rel=ROTARY_SHARE)


def test_flops_of_experts_equal_torch():
    """A shared expert, and a dense layer between the others."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2MoeConfig(**tiny_hf_config("qwen2_moe", **sizes))
    model = Qwen2MoeForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    _, step = torch_flops(True, model)
    architecture = Architecture.from_hf(config.to_dict())
    assert architecture.dense_layers == (1,) and architecture.shared_ffn_hidden_size
    flops = ModelFlops(architecture=architecture, num_heads=1)
    assert flops.step(WHOLE_ROW) == pytest.approx(step, rel=ROTARY_SHARE)
    weights = {name: lora_weights(architecture, {name: 3}) for name in EXPERT_PARAMETERS}
    # Two layers, two experts per token: inputs and outputs of each.
    assert list(weights.values()) == [2 * 2 * 3 * (32 + 2 * 32), 2 * 2 * 3 * (32 + 32)]


def test_flops_of_adapters_and_heads():
    plain = ModelFlops(architecture=ARCHITECTURE, num_heads=1, adapter_weights=0)
    adapters = replace(plain, adapter_weights=100)
    assert adapters.step(WHOLE_ROW) - plain.step(WHOLE_ROW) == 6 * 100 * TOKENS
    another_head = replace(plain, num_heads=2)
    # 4·N·h·V for a frozen head.
    assert another_head.step(WHOLE_ROW) - plain.step(WHOLE_ROW) == 4 * TOKENS * 32 * 96


def test_adapter_weights_equal_peft():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(CONFIG)
    for targets in (LINEAR, ("q_proj", "v_proj")):
        adapted = get_peft_model(model, LoraConfig(r=5, target_modules=list(targets)))
        expected = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert lora_weights(ARCHITECTURE, dict.fromkeys(targets, 5)) == expected
        model = adapted.unload()


def visible_keys(length: int, start: int, window: int | None) -> int:
    """Visible keys of queries at positions `start` ... `start + length - 1`, one by one."""
    return sum(
        sum(1 for key in range(query + 1) if window is None or query - key < window)
        for query in range(start, start + length)
    )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_keys_follow_the_mask(window):
    lengths = [(5, 3, 2), (1, 1, 1), (7, 0, 0), (2, 9, 6)]
    expected = [
        visible_keys(prompt, 0, window)
        + visible_keys(chosen, prompt, window)
        + visible_keys(rejected, prompt, window)
        for prompt, chosen, rejected in lengths
    ]
    assert attended_keys(np.array(lengths), window).tolist() == expected


def rows(share_prompt: bool) -> list[Row]:
    tokens = np.arange(20, dtype=np.int32)
    pairs = [Pair(0, tokens[:5], tokens[:3], tokens[:2]), Pair(1, tokens[:2], tokens[:9], tokens)]
    built = [Row.build([pair], 48, 0, share_prompt=share_prompt) for pair in pairs]
    return [*built, Row.empty(48, 0)]


def test_work_in_rows():
    shared = BatchWork.of(rows(True), (None, 4, None))
    assert (shared.pairs, shared.computed_tokens) == (2, 3 * 48)
    assert (shared.used_tokens, shared.response_tokens) == (10 + 31, 5 + 29)
    attended = {
        window: sum(
            visible_keys(prompt, 0, window)
            + visible_keys(chosen, prompt, window)
            + visible_keys(rejected, prompt, window)
            for prompt, chosen, rejected in ((5, 3, 2), (2, 9, 20))
        )
        for window in (None, 4)
    }
    assert shared.attended == 2 * attended[None] + attended[4]
    unshared = BatchWork.of(rows(False), (None,))
    assert unshared.used_tokens == 41 + 5 + 2
    assert unshared.attended == attended[None] + visible_keys(5, 0, None) + visible_keys(2, 0, None)
    assert (shared + unshared).used_tokens == 41 + 48
    assert BatchWork.of([], (None,)) == BatchWork()

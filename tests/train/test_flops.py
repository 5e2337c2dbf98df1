"""What work costs, against torch's own count of what a Transformers model does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.tokenize.pair import Pair
from megatron_idpo.mcore.model.architecture import Architecture
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

# Torch counts attention as if every query saw every key, and every position is read by the head.
WHOLE_ROW = BatchWork(
    pairs=1, used_tokens=TOKENS, computed_tokens=TOKENS, response_tokens=TOKENS,
    attended=CONFIG.num_hidden_layers * TOKENS**2,
)  # fmt: skip


def counted(trained: bool) -> tuple[int, int]:
    """Torch's count of a forward pass, and of one with its backward, of all weights or none."""
    model: Any = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
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
"""Angles are a matrix product in Transformers; here they are not counted."""


def test_all_weights_cost_what_torch_counts():
    forward, step = counted(trained=True)
    flops = ModelFlops(architecture=ARCHITECTURE, num_heads=1)
    assert flops.forward(WHOLE_ROW) == pytest.approx(forward, rel=ROTARY_SHARE)
    assert flops.step(WHOLE_ROW) == pytest.approx(step, rel=ROTARY_SHARE)


def test_frozen_weights_have_no_gradients_of_their_own():
    forward, step = counted(trained=False)
    flops = ModelFlops(architecture=ARCHITECTURE, num_heads=1, adapter_weights=0)
    assert flops.step(WHOLE_ROW) == pytest.approx(step, rel=ROTARY_SHARE)
    with_reference = replace(flops, reference_forwards=1)
    assert with_reference.step(WHOLE_ROW) == pytest.approx(step + forward, rel=ROTARY_SHARE)


def test_adapters_and_heads():
    plain = ModelFlops(architecture=ARCHITECTURE, num_heads=1, adapter_weights=0)
    adapters = replace(plain, adapter_weights=100)
    assert adapters.step(WHOLE_ROW) - plain.step(WHOLE_ROW) == 6 * 100 * TOKENS
    assert adapters.forward(WHOLE_ROW) - plain.forward(WHOLE_ROW) == 2 * 100 * TOKENS
    another_head = replace(plain, num_heads=2)
    # 4·N·h·V for a frozen head, as DESIGN has it.
    assert another_head.step(WHOLE_ROW) - plain.step(WHOLE_ROW) == 4 * TOKENS * 32 * 96


def test_adapters_have_the_weights_that_peft_makes():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(CONFIG)
    for targets in (LINEAR, ("q_proj", "v_proj")):
        adapted = get_peft_model(model, LoraConfig(r=5, target_modules=list(targets)))
        made = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert lora_weights(ARCHITECTURE, 5, targets) == made
        model = adapted.unload()


def seen(length: int, start: int, window: int | None) -> int:
    """Keys that the queries at positions `start` ... `start + length - 1` see, one by one."""
    return sum(
        sum(1 for key in range(query + 1) if window is None or query - key < window)
        for query in range(start, start + length)
    )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_queries_see_what_the_mask_lets_them(window):
    lengths = [(5, 3, 2), (1, 1, 1), (7, 0, 0), (2, 9, 6)]
    expected = [
        seen(prompt, 0, window) + seen(chosen, prompt, window) + seen(rejected, prompt, window)
        for prompt, chosen, rejected in lengths
    ]
    assert attended_keys(np.array(lengths), window).tolist() == expected


def rows(share_prompt: bool) -> list[Row]:
    tokens = np.arange(20, dtype=np.int32)
    pairs = [Pair(0, tokens[:5], tokens[:3], tokens[:2]), Pair(1, tokens[:2], tokens[:9], tokens)]
    built = [Row.build([pair], 48, 0, share_prompt=share_prompt) for pair in pairs]
    return [*built, Row.empty(48, 0)]


def test_the_work_in_rows():
    shared = BatchWork.of(rows(True), (None, 4, None))
    assert (shared.pairs, shared.computed_tokens) == (2, 3 * 48)
    assert (shared.used_tokens, shared.response_tokens) == (10 + 31, 5 + 29)
    attended = {
        window: sum(
            seen(prompt, 0, window) + seen(chosen, prompt, window) + seen(rejected, prompt, window)
            for prompt, chosen, rejected in ((5, 3, 2), (2, 9, 20))
        )
        for window in (None, 4)
    }
    assert shared.attended == 2 * attended[None] + attended[4]
    apart = BatchWork.of(rows(False), (None,))
    assert apart.used_tokens == 41 + 5 + 2
    assert apart.attended == attended[None] + seen(5, 0, None) + seen(2, 0, None)
    assert (shared + apart).used_tokens == 41 + 48
    assert BatchWork.of([], (None,)) == BatchWork()


def work_of_rank(tensor: int, pipeline: int) -> dict[str, float]:
    from megatron_idpo.mcore.parallel.layout import Layout

    Layout(tensor=tensor, pipeline=pipeline).start()
    return BatchWork.of(rows(True), (None,)).as_extra()


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline", "replicas"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_each_model_replica_counts_its_rows_once(workers, tensor, pipeline, replicas):
    answers = workers.run(work_of_rank, 2, tensor, pipeline)
    total = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    work = BatchWork.of(rows(True), (None,))
    assert BatchWork.from_extra(total) == (work if replicas == 1 else work + work)

"""Memory of one long pair on an 8B model, over context-parallel ranks."""

import pytest

from benchmarks.phantom_steps import LAYOUTS, MODELS, measured

pytestmark = pytest.mark.exhaustive
"""Four models of 8B are built, without arithmetic: a minute."""

LINEAR = 0.9
"""Of the memory of a step on one rank, divided by the ranks."""


def test_memory_of_a_step_falls_with_the_ranks(has_phantom_gpu, record_property):
    model, row_tokens = MODELS["8b"], LAYOUTS["8b-lora-32k-cp1"].row_tokens
    kv_size = model["hidden_size"] // model["num_attention_heads"] * model["num_key_value_heads"]
    # Keys and values of one layer in bf16, as gathered and in row order.
    gathered_bytes = 2 * 2 * row_tokens * kv_size * 2
    steps = {}
    for ranks in (1, 2, 4, 8):
        values = measured(f"8b-lora-32k-cp{ranks}")
        steps[ranks] = values["peak_bytes"] - values["held_bytes"]
        record_property(f"CP{ranks} GB", steps[ranks] / 1e9)
        print(f"CP{ranks} GB", steps[ranks] / 1e9, "of", values["peak_bytes"] / 1e9)
    for ranks in (2, 4, 8):
        assert steps[1] / (ranks * (steps[ranks] - gathered_bytes)) >= LINEAR, ranks

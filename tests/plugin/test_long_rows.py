"""Long pairs on context-parallel ranks of a CPU: one of 8,192 tokens equals one rank, and one of
131,072 tokens trains.

Dealt blocks have 128 positions here, those of other tests up to 4. Memory over the ranks is
measured in `tests/phantom_gpu/test_long_rows.py`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idpo.data.packing.dealing import MAX_BLOCK_TOKENS, block_tokens
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.testing import write_tiny_hf_model

pytestmark = pytest.mark.distributed

BETA = 0.01
"""A log-probability of -5,000 in fp32 has a unit in the last place of 5e-4: with beta 0.1 it would
be 1e-4 of the loss."""

TOLERANCE = 1e-5
"""Relative, of losses and of each gradient (Frobenius): fp32 sums in another order."""

MAX_BYTES = 6e9
"""Of both processes that train a pair of 131,072 tokens."""

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 131_072,
}


def train_long_pair(
    directory: str, context: int, row_tokens: int, answer_tokens: int
) -> dict[str, Any]:
    """Losses and gradients of one pair that fills a row, and the memory of the step."""
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.optim.optimizer import setup_ddp_and_optimizer
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.plugin.attach import attach
    from megatron_idpo.plugin.batch_run import run_batch

    checkpoint, architecture = open_hf(Path(directory))
    layout = Layout(context=context)
    start_layout(layout)
    chunks = build_model(architecture, layout, ModelOptions())
    load_hf_weights(chunks, checkpoint, architecture)
    dpo = attach(
        chunks, layers=[1], objective=Objective(beta=BETA), vocab_size=architecture.vocab_size
    )
    settings = OptimizerConfig(lr=1e-3, distributed=False)  # else ranks keep parts of gradients
    trainable = setup_ddp_and_optimizer(chunks, settings, dpo.finalize_model_grads)
    trainable.zero_grad_buffers()
    weights = {name: value.clone() for name, value in whole_tensors(chunks, architecture)}
    before_bytes = reset_peak()
    outputs = run_batch(
        dpo,
        trainable.model,
        long_pair(row_tokens, answer_tokens),
        None,
        training=True,
        reference_free=True,
    )
    gradients = dict(whole_tensors(chunks, architecture, lambda p: p.main_grad.clone()))
    trainable.step(1e-3)
    peak_bytes = status_bytes("VmHWM")
    return {
        "losses": {output.layer: output.loss_P for output in outputs},
        "gradients": gradients,
        "changes": {n: w - weights[n] for n, w in whole_tensors(chunks, architecture)},
        "step_bytes": peak_bytes - before_bytes,
        "process_bytes": peak_bytes,
    }


def long_pair(row_tokens: int, answer_tokens: int) -> Any:
    from megatron_idpo.data.packing.batches import Batch
    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.pairs import Pair

    random = np.random.default_rng(3)
    lengths = (row_tokens - 2 * answer_tokens, answer_tokens, answer_tokens)
    parts = (random.integers(0, 99, size=n, dtype=np.int32) for n in lengths)
    row = Row.build([Pair(0, *parts)], row_tokens, 0)
    return Batch(
        rows=(row,),
        num_pairs=1,
        consumed_pairs=1,
        used_tokens=row_tokens,
        chosen_tokens=answer_tokens,
        computed_tokens=row_tokens,
    )


def reset_peak() -> int:
    """Begin a new peak of this process's memory; returns what it uses now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024


def check_trained(ranks: list[dict[str, Any]]) -> None:
    """All ranks have the same losses, gradients and weights, and every weight is trained."""
    first = ranks[0]
    assert sorted(first["losses"]) == [1, 2]
    for rank in ranks:
        for kind in ("losses", "gradients", "changes"):
            assert rank[kind].keys() == first[kind].keys()
            for name, value in rank[kind].items():
                assert value.isfinite().all(), (kind, name)
                assert value.abs().max() > 0, (kind, name)
                assert torch.equal(value, first[kind][name]), (kind, name)


@pytest.mark.parametrize("context", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_pair_of_8192_tokens_trains_as_on_one_rank(workers, tmp_path, record_property, context):
    directory = str(tmp_path / "model")
    write_tiny_hf_model(tmp_path / "model", "llama", 1, **SIZES)
    (one,) = workers.run(train_long_pair, 1, directory, 1, 8192, 1024)
    check_trained([one])
    assert block_tokens(8192 // context) == MAX_BLOCK_TOKENS
    ranks = workers.run(train_long_pair, context, directory, context, 8192, 1024)
    check_trained(ranks)
    for kind in ("losses", "gradients"):
        worst = max(
            float((ranks[0][kind][name] - value).norm() / value.norm())
            for name, value in one[kind].items()
        )
        record_property(kind, worst)
        print(f"CP{context} {kind}", worst)
        assert worst <= TOLERANCE, kind


@pytest.mark.exhaustive  # attention over so many positions takes minutes on a CPU
def test_a_pair_of_131072_tokens_trains_on_two_ranks(workers, tmp_path, record_property):
    directory = str(tmp_path / "model")
    write_tiny_hf_model(tmp_path / "model", "llama", 1, **SIZES)
    # Two long answers: half of the attention of a prompt of this length.
    ranks = workers.run(train_long_pair, 2, directory, 2, 131_072, 64_000, timeout_s=1500)
    total = sum(rank["process_bytes"] for rank in ranks)
    record_property("GB", total / 1e9)
    print("GB", total / 1e9, [rank["step_bytes"] / 1e9 for rank in ranks])
    assert total <= MAX_BYTES
    check_trained(ranks)

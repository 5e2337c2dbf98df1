"""A batch through megatron-core's schedule: every micro-batch and chunk once, with or without a
graph."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from tests.plugin import tiny_megatron as tiny

pytestmark = pytest.mark.distributed


def scheduled(layout: Layout, training: bool) -> tuple[list[tuple[int, int]], bool, float]:
    """(chunk, micro-batch) in the order in which they ran, whether graphs were recorded, and the
    sum of this rank's gradients' sizes."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.parallel.pipeline import run_schedule

    chunks = tiny.start(layout)
    ran: list[tuple[int, int]] = []
    graphs = set()
    rows = [RowParams.plain(tiny.ROW_TOKENS) for _ in range(4)]
    tokens_1T = torch.arange(tiny.ROW_TOKENS)[None]

    def forward_step(iterator: Any, chunk: Any) -> Any:
        number = next(iterator)
        ran.append((chunks.index(chunk), number))
        graphs.add(torch.is_grad_enabled())
        output = chunk(tokens_1T, tokens_1T, None, packed_seq_params=rows[number])
        return output, lambda logits: (logits.float().square().mean(), {})

    before = torch.is_grad_enabled()
    run_schedule(forward_step, range(4), chunks, row_tokens=tiny.ROW_TOKENS, training=training)
    assert torch.is_grad_enabled() == before and len(graphs) == 1
    gradients = [p.grad for chunk in chunks for p in chunk.parameters() if p.grad is not None]
    return ran, graphs.pop(), float(sum(gradient.abs().sum() for gradient in gradients))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)],
    ids=["one", "pipeline", "interleaved"],
)
def test_every_chunk_runs_every_micro_batch_once(workers, layout):
    every = [(c, n) for c in range(layout.virtual_pipeline) for n in range(4)]
    for ran, has_graph, size in workers.run(scheduled, layout.pipeline, layout, False):
        assert sorted(ran) == every and not has_graph and size == 0
    for ran, has_graph, size in workers.run(scheduled, layout.pipeline, layout, True):
        assert sorted(ran) == every and has_graph and size > 0

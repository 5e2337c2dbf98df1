"""One global batch through megatron-core's stock pipeline schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

ForwardStep = Callable[[Iterator[Any], Any], tuple[Any, Callable[[Any], Any]]]
"""megatron-core's `forward_step_func`: from an iterator of micro-batches and a model chunk to the
chunk's output and the loss function of the last stage."""


def run_schedule(
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    model: Sequence[Any],
    *,
    row_tokens: int,
    training: bool,
) -> None:
    """Run every micro-batch through this rank's chunks. Collective over the pipeline.

    Args:
        forward_step: called for every micro-batch and chunk.
        micro_batches: of this data-parallel rank, the same on every stage.
        model: this rank's chunks, in DDP or not.
        row_tokens: positions of every micro-batch.
        training: also run backward; otherwise no graph is recorded.
    """
    with torch.set_grad_enabled(training):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in model],
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=row_tokens,
            micro_batch_size=1,
            forward_only=not training,
        )

"""`run_batch`: one global batch of preference pairs through an attached model.

P  pairs of a row
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.pipeline import run_schedule
from megatron_idpo.mcore.watchdog.activity import progressed
from megatron_idpo.plugin.attach import AttachedDpo
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.plugin.rows import row_micro_batch

ReferenceLogps = Sequence[Mapping[int, Tensor]]
"""The reference's log-probabilities, float32 `[2P]`, by row of the batch and by layer. Every stage
needs those of the layers it holds."""


def run_batch(
    dpo: AttachedDpo,
    model: Sequence[Any],
    batch: Batch,
    reference: ReferenceLogps | None,
    *,
    training: bool = False,
    reference_free: bool = False,
) -> list[LayerOutput]:
    """Run this rank's rows of a batch through megatron-core's schedule. Collective.

    Args:
        dpo: attached to the chunks.
        model: this rank's chunks, in DDP or not.
        batch: this rank's rows of the global batch.
        reference: the reference's log-probabilities; None: outputs have no loss.
        training: run backward too, for gradients in DDP's buffers; needs a reference or
            `reference_free`. Also sets the mode of the chunks, which switches dropout.
        reference_free: the reference's log-probabilities count as 0.

    Returns:
        The outputs of this rank's layers, sorted by micro-batch and layer.
    """
    micro_batches = [
        row_micro_batch(
            row,
            default_device(),
            context=dpo.context,
            reference_logps={} if reference is None else reference[index],
            reference_free=reference_free,
            index=index,
            num_micro_batches=len(batch.rows),
            global_pairs=batch.num_pairs,
            mean_chosen_tokens=batch.mean_chosen_tokens,
        )
        for index, row in enumerate(batch.rows)
    ]

    def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Any]:
        progressed()
        preferences, inputs = next(iterator)
        return dpo.forward(chunk, preferences, **inputs), partial(dpo.loss, preferences)

    for chunk in model:
        chunk.train(training)
    with dpo.collect_outputs(len(batch.rows)) as outputs:
        run_schedule(
            forward_step, micro_batches, model, row_tokens=batch.row_tokens, training=training
        )
    return sorted(outputs, key=lambda output: (output.micro_batch, output.layer))


def logps_by_row(outputs: Sequence[LayerOutput], num_rows: int) -> list[dict[int, Tensor]]:
    """The log-probabilities of outputs, in the form of `run_batch`'s `reference`."""
    by_row: list[dict[int, Tensor]] = [{} for _ in range(num_rows)]
    for output in outputs:
        by_row[output.micro_batch][output.layer] = output.logps_2P
    return by_row

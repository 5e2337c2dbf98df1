"""Outputs of the layers of one pipeline stage: `LayerOutput`, and the `OutputBuffer` of a step.

A training script that leaves out a chunk, mixes up its micro-batches or miscounts pairs gets wrong
gradients without an error from megatron-core. The buffer records every output and checks the counts
when the script takes them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import all_gather_objects
from megatron_idpo.plugin.micro_batch import MicroBatch

_REMEDY = (
    "take outputs once, after the schedule; run every micro-batch through every chunk with "
    "AttachedDpo.forward, and backward too unless under torch.no_grad; "
    "pass AttachedDpo.loss to the schedule as its loss function"
)


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """Log-probabilities and loss of one micro-batch at one layer."""

    layer: int
    """Counted from 1; the model's number of layers is the final one."""

    micro_batch: int
    """`MicroBatch.index`."""

    logps_2P: Tensor
    """Sequence log-probabilities of the policy, float32, detached."""

    reference_logps_2P: Tensor | None
    """The reference's, if the micro-batch has them."""

    loss_P: Tensor | None
    """The layer's own loss of each pair (Eq. 1), unweighted, detached; None without a reference."""

    lengths_2P: Tensor | None = None
    """Response tokens of each sequence, float32; None without a loss."""


class OutputBuffer:
    """The outputs of one rank's layers since they were last taken."""

    def __init__(self, layers: Sequence[int], final: int, *, counts_pairs: bool) -> None:
        """Create an empty buffer.

        Args:
            layers: this rank's layers, tapped or final, with one output per micro-batch.
            final: the final layer.
            counts_pairs: whether this rank adds the final layer's pairs to the global count: true
                on one tensor-parallel rank of each last stage, so that no pair counts twice.
        """
        self._layers = list(layers)
        self._final = final
        self._counts_pairs = counts_pairs
        self._clear()

    def _clear(self) -> None:
        self._outputs: list[LayerOutput] = []
        self._num_micro_batches_seen: set[int] = set()
        self._clear_pairs()

    def _clear_pairs(self) -> None:
        self._global_pairs_seen: set[int] = set()
        self._trained_pairs = 0

    def record(self, output: LayerOutput) -> None:
        """Keep the output of a layer."""
        self._outputs.append(output)

    def record_trained(self, layer: int, micro_batch: MicroBatch) -> None:
        """Record the counts by which a layer's loss of a micro-batch is scaled for the gradient.

        Raises:
            ConfigError: the micro-batch lacks these counts.
        """
        for name in ("num_micro_batches", "global_pairs"):
            count = getattr(micro_batch, name)
            if count < 1:
                raise ConfigError.at(
                    f"MicroBatch.{name}",
                    f"is {count} in training",
                    "set num_micro_batches to the micro-batches that this rank runs in the step, "
                    "and global_pairs to the pairs of all data-parallel ranks",
                )
        self._num_micro_batches_seen.add(micro_batch.num_micro_batches)
        self._global_pairs_seen.add(micro_batch.global_pairs)
        if layer == self._final:
            self._trained_pairs += micro_batch.targets.num_pairs

    def check_pairs(self) -> None:
        """Compare the pairs of the step with `MicroBatch.global_pairs`. Collective over the world.

        Raises:
            ConfigError: on every rank, if the losses were averaged over another number of pairs.
        """
        local = (self._trained_pairs if self._counts_pairs else 0, sorted(self._global_pairs_seen))
        self._clear_pairs()
        by_rank = all_gather_objects(local)
        num_pairs = sum(trained_pairs for trained_pairs, _ in by_rank)
        stated = sorted({global_pairs for _, seen in by_rank for global_pairs in seen})
        if stated != [num_pairs]:
            raise ConfigError.at(
                "MicroBatch.global_pairs",
                f"is {' and '.join(map(str, stated)) or 'not set'}, "
                f"but the step had {num_pairs} pairs",
                "count the pairs of all micro-batches of all data-parallel ranks",
            )

    def take(self, num_micro_batches: int) -> list[LayerOutput]:
        """Return all outputs and empty the buffer, also on an error.

        Raises:
            ConfigError: a layer does not have exactly one output per micro-batch.
        """
        outputs, num_seen = self._outputs, self._num_micro_batches_seen
        self._clear()
        if wrong := sorted(num_seen - {num_micro_batches}):
            raise ConfigError.at(
                "MicroBatch.num_micro_batches",
                f"is {wrong[0]}, but {num_micro_batches} micro-batches were run",
                "set it to the schedule's num_microbatches",
            )
        counts = {layer: Counter[int]() for layer in self._layers}
        for output in outputs:
            counts[output.layer][output.micro_batch] += 1
        for layer, by_micro_batch in counts.items():
            if by_micro_batch.total() != num_micro_batches:
                raise ConfigError.at(
                    f"layer {layer}",
                    f"has {by_micro_batch.total()} outputs for {num_micro_batches} micro-batches",
                    _REMEDY,
                )
        if len({frozenset(by_micro_batch.items()) for by_micro_batch in counts.values()}) > 1:
            raise ConfigError.at(
                "data_iterator",
                f"this rank's layers {self._layers} received different micro-batches",
                "give every model chunk its own iterator over the same micro-batches",
            )
        return outputs

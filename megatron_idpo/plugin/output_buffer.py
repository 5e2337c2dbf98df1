"""What the layers of this rank said in a step, and whether that can be all of it.

A training script that leaves a chunk out, mixes up its micro-batches or miscounts them gets
gradients that are wrong without a word from megatron-core. What is said is recorded here, and the
count is checked where a script takes it.
"""

from collections import Counter
from collections.abc import Sequence

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import gathered
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.plugin.micro_batch import MicroBatch


class OutputBuffer:
    """The outputs of one rank's layers since they were last taken."""

    def __init__(self, layers: Sequence[int], final: int, *, counts_pairs: bool) -> None:
        """An empty ledger.

        Args:
            layers: this rank's layers, tapped or final, that say something of each micro-batch.
            final: the final layer's number.
            counts_pairs: whether this rank's final layer counts the pairs of a step: on one
                tensor-parallel rank of each last stage.
        """
        self._layers = list(layers)
        self._final = final
        self._counts_pairs = counts_pairs
        self._outputs: list[LayerOutput] = []
        self._micro_batches_said: set[int] = set()
        self._global_pairs_said: set[int] = set()
        self._trained_pairs = 0

    def record(self, output: LayerOutput) -> None:
        """Keep what a layer said of a micro-batch."""
        self._outputs.append(output)

    def record_trained(self, layer: int, micro_batch: MicroBatch) -> None:
        """Note that a layer's loss of a micro-batch is about to be scaled for the gradient.

        Raises:
            ConfigError: the micro-batch does not say what the loss is averaged over.
        """
        counts = {
            "num_micro_batches": micro_batch.num_micro_batches,
            "global_pairs": micro_batch.global_pairs,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError.at(
                    f"MicroBatch.{name}",
                    f"is {count} in training",
                    "say how many micro-batches this rank runs in the step, and how many pairs "
                    "all data-parallel ranks together train on",
                )
        self._micro_batches_said.add(micro_batch.num_micro_batches)
        self._global_pairs_said.add(micro_batch.global_pairs)
        if layer == self._final:
            self._trained_pairs += micro_batch.targets.num_pairs

    def check_pairs(self) -> None:
        """Compare the pairs of the step with `MicroBatch.global_pairs`. Collective over the world.

        Raises:
            ConfigError: on every rank, where the loss is averaged over another number of pairs.
        """
        mine, self._trained_pairs = self._trained_pairs, 0
        said, self._global_pairs_said = self._global_pairs_said, set()
        message = gathered((mine if self._counts_pairs else 0, sorted(said)))
        pairs = sum(count for count, _ in message)
        everywhere = sorted({number for _, numbers in message for number in numbers})
        if everywhere != [pairs]:
            numbers = " and ".join(map(str, everywhere)) or "nothing"
            raise ConfigError.at(
                "MicroBatch.global_pairs",
                f"says {numbers}, but the step had {pairs} pairs",
                "it is the number over all micro-batches and all data-parallel ranks",
            )

    def take(self, num_micro_batches: int) -> list[LayerOutput]:
        """All outputs, which are forgotten here.

        Raises:
            ConfigError: a layer did not speak once of each of `num_micro_batches`.
        """
        outputs, self._outputs = self._outputs, []
        said, self._micro_batches_said = self._micro_batches_said, set()
        self._trained_pairs = 0
        self._global_pairs_said = set()
        if wrong := sorted(said - {num_micro_batches}):
            raise ConfigError.at(
                "MicroBatch.num_micro_batches",
                f"is {wrong[0]}, but {num_micro_batches} were run",
                "give the number that the schedule is given (num_microbatches)",
            )
        read = {layer: Counter[int]() for layer in self._layers}
        for output in outputs:
            read[output.layer][output.micro_batch] += 1
        for layer, indices in read.items():
            if indices.total() != num_micro_batches:
                raise ConfigError.at(
                    f"layer {layer}",
                    f"was read {indices.total()} times in {num_micro_batches} micro-batches",
                    _remedy(layer == self._final),
                )
        if len(set(map(_counted, read.values()))) > 1:
            raise ConfigError.at(
                "data_iterator",
                f"this rank's layers {self._layers} were given different micro-batches",
                "give every model chunk an iterator of its own over the same micro-batches",
            )
        return outputs


def _counted(indices: Counter[int]) -> frozenset[tuple[int, int]]:
    return frozenset(indices.items())


def _remedy(is_final: bool) -> str:
    if is_final:
        return (
            "take outputs once, after the schedule; run every micro-batch through "
            "AttachedDpo.forward and give the schedule AttachedDpo.loss as its loss function"
        )
    return (
        "take outputs once, after the schedule; run every micro-batch through every chunk by "
        "AttachedDpo.forward, and backward too unless under torch.no_grad"
    )

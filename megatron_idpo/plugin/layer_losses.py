"""The losses of one rank's layers: computed, scaled for megatron-core, recorded.

Loss scaling. With B pairs in the global batch, M micro-batches per rank, D data-parallel and C
context-parallel ranks, every pair must weigh 1/B in the gradient, independent of its micro-batch.
megatron-core averages: the schedule divides the final layer's loss by M and multiplies it by C, DDP
divides gradients by D * C. So the final layer's loss of a micro-batch is
`(1 - w) * sum(L) * M * D / B`. A tapped layer's loss does not pass through the schedule, so it has
no M, but has to apply C and the loss scale itself: `w * share * sum(L) * D * C / B * grad_scale`.

With `calculate_per_token_loss` neither the schedule nor DDP averages: gradients are summed and, at
the end of the step, divided by the sum of the counts that the loss function returned. So both
losses are `weight * sum(L)`, and the count is the number of pairs, on one context-parallel rank
only.

    P  pairs; 2P answers
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.objective import SORTED
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.groups import ModelGroups
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.plugin.outputs import LayerOutput, OutputRecorder
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.step_log import StepLog

Returned = tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, Tensor, dict[str, Tensor]]
"""What megatron-core's schedule takes from a loss function: the loss, with
`calculate_per_token_loss` the number that gradients are divided by, and the log."""


class LayerLosses:
    """The losses of the layers that one rank has, tapped or final.

    Attributes:
        outputs: what was computed in the current step, and since the last one.
        log: what Megatron's training loop prints.
    """

    def __init__(
        self,
        own_layers: Sequence[int],
        scales: Mapping[int, float],
        objective: Objective,
        groups: ModelGroups,
        config: Any,
    ) -> None:
        """Nothing computed yet.

        Args:
            own_layers: this rank's layers.
            scales: the weight of each layer's loss in the combined loss, the final layer's too.
            objective: the loss of a layer.
            groups: of the model.
            config: megatron-core's `TransformerConfig` of the model.
        """
        self._scales = dict(scales)
        self._final = max(scales)
        self._objective = objective
        self._groups = groups
        self._config = config
        self.outputs = OutputRecorder(
            own_layers,
            self._final,
            objective,
            counts_pairs=groups.counts_pairs,
            has_all_pairs=groups.data_size == 1,
            batch_groups=groups.batch_groups,
        )
        self.log = StepLog(scales, groups)

    def final_layer(self, batch: PreferenceBatch, logps_2P: Tensor) -> Returned:
        """What the loss function returns to the schedule.

        The log-probabilities are as for `evaluate`. Without gradients the loss is 0; without a
        reference the log is empty.

        Raises:
            ConfigError: as for `evaluate`.
        """
        output, loss_P = self.evaluate(self._final, batch, logps_2P)
        loss, log = logps_2P.new_zeros(()), {}
        if loss_P is not None and torch.is_grad_enabled():
            # The schedule divides by M, which would make a pair's weight depend on how many
            # micro-batches its batch was split into.
            pairs = batch.global_pairs / (self._groups.data_size * batch.num_micro_batches)
            loss, log = self._scaled(self._final, loss_P, pairs), self.log.placeholder(logps_2P)
        elif loss_P is not None:
            log = self.log.final_layer(output.sums(self._objective))
        if not self._config.calculate_per_token_loss:
            return loss, log
        # Context-parallel ranks have the same pairs, and megatron-core adds up their counts.
        count = batch.num_pairs if self._groups.context_rank == 0 else 0
        return loss, torch.full((), count, dtype=torch.int, device=loss.device), log

    def tapped_layer(self, layer: int, batch: PreferenceBatch, logps_2P: Tensor) -> Tensor:
        """The scaled loss of a tapped layer, without megatron-core's loss scale.

        The log-probabilities are as for `evaluate`.

        Raises:
            ConfigError: as for `evaluate`.
        """
        _, loss_P = self.evaluate(layer, batch, logps_2P)
        assert loss_P is not None
        return self._scaled(
            layer, loss_P, batch.global_pairs / self._groups.data_and_context.size()
        )

    def _scaled(self, layer: int, loss_P: Tensor, num_pairs: float) -> Tensor:
        """The sum of a layer's losses times its weight, over the pairs of the average."""
        if self._config.calculate_per_token_loss:
            num_pairs = 1.0
        return loss_P.sum() * (self._scales[layer] / num_pairs)

    def evaluate(
        self, layer: int, batch: PreferenceBatch, logps_2P: Tensor
    ) -> tuple[LayerOutput, Tensor | None]:
        """A layer's output, recorded, and each pair's loss `[P]`; None without a reference.

        Args:
            layer: the layer.
            batch: of the output.
            logps_2P: of its answers; `[4P]` with the sharpened ones (`weighs_pairs`).

        Raises:
            ConfigError: in training, a batch without the reference's log-probabilities or without
                counts, or an output too many; a loss of the whole global batch of which the
                micro-batch has a part, or whose number of tokens is missing.
        """
        sharpened_2P = None
        if self.weighs_pairs(batch):
            logps_2P, sharpened_2P = logps_2P.chunk(2)
        reference_layer = layer if self._objective.reference_layer == "same" else self._final
        reference_2P = batch.reference_logps.get(reference_layer)
        loss_P = lengths_2P = None
        if reference_2P is not None or batch.reference_free:
            self._check_whole_batch(batch)
            lengths_2P = batch.lengths()
            loss_P = layer_loss(
                logps_2P,
                reference_2P,
                lengths_2P,
                self._objective,
                mean_chosen_tokens=batch.mean_chosen_tokens or None,
                sharpened_logps_2P=sharpened_2P,
            )
        elif torch.is_grad_enabled():
            raise ConfigError.at(
                f"micro-batch {batch.index}",
                f"lacks the reference log-probabilities of layer {reference_layer}",
                "score the data with the reference at every tapped layer and the final one first; "
                "run scoring itself under torch.no_grad",
            )
        output = LayerOutput(
            layer,
            batch.index,
            logps_2P.detach(),
            reference_2P,
            None if loss_P is None else loss_P.detach(),
            lengths_2P,
        )
        self.outputs.record(output, batch, trains=torch.is_grad_enabled())
        return output, loss_P

    def weighs_pairs(self, batch: PreferenceBatch) -> bool:
        """Whether the losses of this batch need sharpened log-probabilities, for WPO's weights."""
        return self._objective.wpo and bool(batch.reference_free or batch.reference_logps)

    def _check_whole_batch(self, batch: PreferenceBatch) -> None:
        """What losses need that are not sums over pairs."""
        objective = self._objective
        if objective.uses(*SORTED) and batch.num_pairs not in (0, batch.global_pairs):
            message = (
                f"{' and '.join(objective.losses)} compares sorted values of all "
                f"{batch.global_pairs} pairs of a global batch, of which micro-batch {batch.index} "
                f"has {batch.num_pairs}"
            )
            remedy = "give all of them to one micro-batch of one data-parallel rank "
            remedy += "(PreferenceBatch.global_pairs), or use another loss"
            raise ConfigError.at("objective.loss", message, remedy)
        if objective.uses("sft") and batch.num_pairs and not batch.mean_chosen_tokens:
            message = (
                "sft is a mean over all chosen tokens of a global batch, whose number is missing"
            )
            remedy = "set PreferenceBatch.mean_chosen_tokens: chosen tokens per pair"
            raise ConfigError.at("objective.loss", message, remedy)

    @contextmanager
    def discarding_step_on_error(self) -> Iterator[None]:
        """Forget the step if the block fails, or the next one would begin in its middle."""
        try:
            yield
        except BaseException:
            self.discard_step()
            raise

    def discard_step(self) -> None:
        """Forget the current step."""
        self.outputs.discard_step()
        self.log.discard()

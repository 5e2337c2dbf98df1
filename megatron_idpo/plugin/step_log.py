"""The log of a step as Megatron's training loop reads it: `{name: [sum, number of pairs]}`.

The loop reduces the dictionaries that the loss function returned: it sums the values of all
micro-batches and of the data-parallel ranks, and prints sum / number. Taps are evaluated in the
backward pass, after the loss function returned, and on other stages. So the dictionaries of a step
hold tensors that are filled when its gradients are finished.

    K  tapped layers   L = K + 1 with the final one   M  metrics
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.mcore.cpu.redirect import default_device, to_device
from megatron_idpo.mcore.parallel.groups import ModelGroups
from megatron_idpo.plugin.outputs import SUMMED

LOSS = "loss"
"""The combined loss (Eq. 3)."""

FINAL_LOSS = "final loss"
"""The final layer's own loss, if there are taps."""

_TAP_METRICS = ("loss", "rewards/margins", "rewards/accuracies")
"""What is logged of a tapped layer, as `layer 22 loss`."""


class StepLog:
    """Names and values of a model's log."""

    def __init__(self, scales: Mapping[int, float], groups: ModelGroups) -> None:
        """Nothing logged yet.

        Args:
            scales: the weight of each layer's loss in the combined loss; the final layer is the
                last by number.
            groups: of the model.
        """
        self._layers = sorted(scales)
        self._scales = [scales[layer] for layer in self._layers]
        self._groups = groups
        self._tables: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        """The names, in the order of `_values`."""
        *taps, _ = self._layers
        own = [LOSS, *([FINAL_LOSS] if taps else []), *SUMMED[1:]]
        return own + [f"layer {layer} {name}" for layer in taps for name in _TAP_METRICS]

    def placeholder(self, reference: Tensor) -> dict[str, Tensor]:
        """The values of a micro-batch in training, `[2]` each: zeros until `fill`."""
        table = torch.zeros(len(self.names), 2, device=reference.device)
        self._tables.append(table)
        return dict(zip(self.names, table.unbind(0), strict=True))

    def final_layer(self, sums: Tensor) -> dict[str, Tensor]:
        """The values of a micro-batch in an evaluation, `[2]` each: the final layer's only."""
        name = FINAL_LOSS if len(self._layers) > 1 else LOSS
        return {
            name: torch.stack([sums[index], sums[-1]]).float()
            for index, name in enumerate((name, *SUMMED[1:]))
        }

    def discard(self) -> None:
        """Forget the placeholders of a step that failed."""
        self._tables = []

    def fill(self, sums_by_layer: Mapping[int, Tensor]) -> None:
        """Fill the placeholders of a step. Collective over the pipeline: one all-reduce.

        The whole step is written to its first micro-batch: its reader adds up all of them.

        Args:
            sums_by_layer: of this rank's layers (`OutputRecorder.finish_step`).
        """
        sums_LM = self._reduce(sums_by_layer, [self._groups.pipeline])
        tables, self._tables = self._tables, []
        if tables:
            tables[0].copy_(self._values(sums_LM))

    def evaluation(self, sums_by_layer: Mapping[int, Tensor]) -> dict[str, float]:
        """Means over all pairs of an evaluation. Collective over pipeline and data ranks.

        Returns:
            The same on every rank; empty if nothing was evaluated.
        """
        groups = [self._groups.pipeline, self._groups.data_and_context]
        values = self._values(self._reduce(sums_by_layer, groups)).tolist()
        if not values[0][1]:
            return {}
        return {
            name: total / pairs for name, (total, pairs) in zip(self.names, values, strict=True)
        }

    def _reduce(
        self, sums_by_layer: Mapping[int, Tensor], groups: Sequence[dist.ProcessGroup]
    ) -> Tensor:
        """The sums of all layers, `[L, M + 1]`: each layer is on one stage."""
        sums_LM = torch.zeros(
            len(self._layers), len(SUMMED) + 1, dtype=torch.float64, device=default_device()
        )
        for layer, sums in sums_by_layer.items():
            sums_LM[self._layers.index(layer)] = sums
        for group in groups:
            if group.size() > 1:
                dist.all_reduce(sums_LM, group=group)
        return sums_LM

    def _values(self, sums_LM: Tensor) -> Tensor:
        """`[sum, number of pairs]` of every name."""
        scales_L = to_device(torch.tensor(self._scales, dtype=torch.float64), sums_LM.device)
        taps_LM, final_M = sums_LM[:-1], sums_LM[-1]
        # Every layer has the same pairs.
        combined = (scales_L * sums_LM[:, 0]).sum()
        own = [combined, *([final_M[0]] if len(taps_LM) else []), *final_M[1:-1]]
        own += [tap_M[SUMMED.index(name)] for tap_M in taps_LM for name in _TAP_METRICS]
        return torch.stack([torch.stack([value, final_M[-1]]) for value in own])

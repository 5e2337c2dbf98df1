"""Reading a layer: the final norm and the output layer, asked for response tokens only.

A `Head` is one chunk's way to the final norm and its shard of the output weight, whether the chunk
owns them or holds a replica. Every layer, the final one included, goes through the same code.

    T  row positions (t: this rank's shard under sequence parallelism)   H  hidden size
    N  targets   V  this rank's rows of the padded vocabulary   P  pairs
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_idpo.mcore.model.chunk import gather_positions
from megatron_idpo.plugin.logprobs import vocab_parallel_logprobs
from megatron_idpo.plugin.micro_batch import Targets


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which rows of the vocabulary this tensor-parallel rank holds."""

    group: torch.distributed.ProcessGroup
    start: int
    """The vocabulary's number of this rank's first row."""

    num_valid: int
    """Rows of the whole vocabulary; what lies beyond is padding and no token."""


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and output layer, as one chunk reaches them."""

    norm: Callable[[Tensor], Tensor]
    """The final norm, `[..., H]` to `[..., H]`."""

    weight: Callable[[], Tensor]
    """This rank's shard `[V, H]`, asked for when it is used: DDP may move parameters."""

    shard: VocabShard
    sequence_parallel: bool
    use_norm: bool = True
    """False reads tapped layers without the final norm (`norm: none`)."""

    replica: Callable[[], None] | None = None
    """The chunk's copy, where it has one, to be entered as a module."""

    def enter(self) -> None:
        """Let DDP wait for a copy's parameters, in the forward pass before they are used."""
        if self.replica is not None:
            self.replica()

    def sequence_logps(self, hidden_t1H: Tensor, targets: Targets, *, normed: bool) -> Tensor:
        """Log-probability of every sequence of a row, read at one layer.

        Under sequence parallelism the norm works on this rank's positions and an all-gather follows
        (backward: reduce-scatter of the ranks' partial gradients, so the norm's weight gradient is
        a part that megatron-core adds up). Otherwise positions are picked first and the gradient is
        summed over tensor-parallel ranks by the log-probabilities' backward (an all-reduce).

        Args:
            hidden_t1H: the layer's output.
            targets: what to score.
            normed: the final norm has been applied already (the final layer).

        Returns:
            float32 `[2P]`.
        """
        apply_norm = self.use_norm and not normed
        if self.sequence_parallel:
            hidden_t1H = self.norm(hidden_t1H) if apply_norm else hidden_t1H
            hidden_T1H = gather_positions(hidden_t1H, self.shard.group)
            hidden_NH = hidden_T1H[:, 0].index_select(0, targets.positions_N)
        else:
            hidden_NH = hidden_t1H[:, 0].index_select(0, targets.positions_N)
            hidden_NH = self.norm(hidden_NH) if apply_norm else hidden_NH
        weight_VH = self.weight()
        logps_N = vocab_parallel_logprobs(
            hidden_NH.to(weight_VH.dtype),
            weight_VH,
            targets.tokens_N,
            group=self.shard.group,
            vocab_start=self.shard.start,
            vocab_valid=self.shard.num_valid,
            frozen=not weight_VH.requires_grad,
            reduce_hidden_grad=not self.sequence_parallel,
        )
        return targets.sum_by_sequence(logps_N)

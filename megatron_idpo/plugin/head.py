"""Log-probabilities at a layer: the final norm and the output layer, for response tokens only.

A `Head` is a chunk's access to the final norm and to its shard of the output weight, whether the
chunk owns them or holds a replica. Every layer, the final one included, uses the same code.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Final norm and output layer, as one chunk uses them."""

    norm: Callable[[Tensor], Tensor]
    """The final norm, `[..., H]` to `[..., H]`."""

    weight: Callable[[], Tensor]
    """Returns this rank's shard `[V, H]`. Called at each use, because DDP may move parameters."""

    group: torch.distributed.ProcessGroup
    """The tensor-parallel ranks, which share the vocabulary."""

    vocab_start: int
    """Token id of the shard's first row."""

    vocab_size: int
    """Tokens of the whole vocabulary; rows beyond them are padding."""

    sequence_parallel: bool
    use_norm: bool = True
    """False reads tapped layers without the final norm (`norm: none`)."""

    replica: Callable[[], None] | None = None
    """The chunk's replica, if it has one; calling it runs the module's pre-hooks."""

    def enter(self) -> None:
        """Let DDP wait for a replica's parameters, in the forward pass before they are used."""
        if self.replica is not None:
            self.replica()

    def sequence_logps(self, hidden_t1H: Tensor, targets: Targets, *, normed: bool) -> Tensor:
        """Log-probability of every sequence of a row, read at one layer.

        Collectives over the tensor-parallel group. With sequence parallelism: forward, an
        all-gather of the positions; backward, a reduce-scatter of the ranks' partial gradients.
        Without: backward, an all-reduce of the hidden gradient. Both: those of
        `vocab_parallel_logprobs`.

        Args:
            hidden_t1H: the layer's output.
            targets: the tokens to score.
            normed: the final norm has been applied already (the final layer).

        Returns:
            float32 `[2P]`.
        """
        apply_norm = self.use_norm and not normed
        if self.sequence_parallel:
            # Norm before the gather: each rank normalizes its own positions, so the norm's weight
            # gradient is partial per rank, as megatron-core expects and sums in finalize.
            hidden_t1H = self.norm(hidden_t1H) if apply_norm else hidden_t1H
            hidden_T1H = gather_positions(hidden_t1H, self.group)
            hidden_NH = hidden_T1H[:, 0].index_select(0, targets.positions_N)
        else:
            # Select before the norm: prompt positions need neither the norm nor the projection.
            hidden_NH = hidden_t1H[:, 0].index_select(0, targets.positions_N)
            hidden_NH = self.norm(hidden_NH) if apply_norm else hidden_NH
        weight_VH = self.weight()
        logps_N = vocab_parallel_logprobs(
            hidden_NH.to(weight_VH.dtype),
            weight_VH,
            targets.tokens_N,
            group=self.group,
            vocab_start=self.vocab_start,
            vocab_valid=self.vocab_size,
            frozen=not weight_VH.requires_grad,
            # The gather's backward sums over the ranks; a second sum would scale gradients by TP.
            reduce_hidden_grad=not self.sequence_parallel,
        )
        return targets.sum_by_sequence(logps_N)

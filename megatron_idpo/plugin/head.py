"""Log-probabilities at a layer: the final norm and the output layer, for response tokens only.

A `Head` is a chunk's access to the final norm and to its shard of the output weight, whether the
chunk owns them or holds a replica. Every layer, the final one included, uses the same code.

    S  positions (s: this rank's shard under sequence parallelism)   B  batch   H  hidden size
    N  targets   V  this rank's rows of the padded vocabulary   Q  sequences
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.errors import DataError
from megatron_idpo.mcore.model.chunk import gather_positions
from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.plugin.logprobs import vocab_parallel_logprobs
from megatron_idpo.plugin.targets import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Final norm and output layer, as one chunk uses them."""

    norm: Callable[[Tensor], Tensor]
    """The final norm, `[..., H]` to `[..., H]`."""

    weight: Callable[[], Tensor]
    """Returns this rank's shard `[V, H]`. Called at each use, because DDP may move parameters."""

    group: dist.ProcessGroup | None
    """The tensor-parallel ranks, which share the vocabulary."""

    context_group: dist.ProcessGroup | None = None
    """The context-parallel ranks, which share the positions."""

    vocab_start: int
    """Token id of the shard's first row."""

    vocab_size: int
    """Tokens of the whole vocabulary; rows beyond them are padding."""

    sequence_parallel: bool
    logit_map: LogitMap = field(default_factory=LogitMap)
    """What the model does with the product of hidden states and weight."""

    use_norm: bool = True
    """False reads tapped layers without the final norm (`norm: none`)."""

    replica: Callable[[], None] | None = None
    """The chunk's replica, if it has one; calling it runs the module's pre-hooks."""

    owner: torch.nn.Module | None = None
    """The module of the weight, in a chunk without a replica; its forward comes after the taps."""

    def enter(self, *, evaluates_now: bool) -> None:
        """Let DDP wait for the weight, in the forward pass before it is used.

        Args:
            evaluates_now: whether it is used now. Otherwise it is in the backward pass, when the
                owner has run.
        """
        if self.replica is not None:
            self.replica()
        elif self.owner is not None and evaluates_now:
            for hook in self.owner._forward_pre_hooks.values():
                hook(self.owner, ())

    def sequence_logps(
        self, hidden_sBH: Tensor, targets: Targets, *, normed: bool, sharpness: int = 1
    ) -> Tensor:
        """Log-probability of every sequence, read at one layer.

        Collectives over the tensor-parallel group. With sequence parallelism: forward, an
        all-gather of the positions; backward, a reduce-scatter of the ranks' partial gradients.
        Without: backward, an all-reduce of the hidden gradient. Both: those of
        `vocab_parallel_logprobs`. Over the context-parallel group: forward, an all-reduce of the
        result; backward, none.

        Args:
            hidden_sBH: the layer's output.
            targets: the tokens to score, of this rank's positions (`Targets.on_context_rank`).
            normed: the final norm has been applied already (the final layer).
            sharpness: a power of 2 that logits are multiplied by.

        Returns:
            float32 `[Q]`.

        Raises:
            DataError: the targets are those of a batch of another size.
        """
        self._check_size(hidden_sBH, targets)
        apply_norm = self.use_norm and not normed
        if self.sequence_parallel:
            # Norm before the gather: each rank normalizes its own positions, so the norm's weight
            # gradient is partial per rank, as megatron-core expects and sums in finalize.
            hidden_sBH = self.norm(hidden_sBH) if apply_norm else hidden_sBH
            assert self.group is not None
            # Shards are runs of positions, so positions are numbered alike before and after.
            hidden_SBH = gather_positions(hidden_sBH, self.group)
            hidden_NH = hidden_SBH.flatten(0, 1).index_select(0, targets.positions_N)
        else:
            # Select before the norm: prompt positions need neither the norm nor the projection.
            hidden_NH = hidden_sBH.flatten(0, 1).index_select(0, targets.positions_N)
            hidden_NH = self.norm(hidden_NH) if apply_norm else hidden_NH
        weight_VH = self.weight()
        hidden_NH = hidden_NH.to(weight_VH.dtype)
        logps_N = vocab_parallel_logprobs(
            hidden_NH,
            weight_VH,
            targets.tokens_N,
            group=self.group,
            vocab_start=self.vocab_start,
            vocab_valid=self.vocab_size,
            logit_map=self.logit_map.sharpened(sharpness),
            frozen=not weight_VH.requires_grad,
            # The gather's backward sums over the ranks; a second sum would scale gradients by TP.
            reduce_hidden_grad=not self.sequence_parallel,
        )
        logps_Q = targets.sum_by_sequence(logps_N)
        if self.context_group is None or self.context_group.size() == 1:
            return logps_Q
        summed: Tensor = _SumOverContext.apply(logps_Q, self.context_group)
        return summed

    def _check_size(self, hidden_sBH: Tensor, targets: Targets) -> None:
        num_rows, num_positions = targets.shape
        shards = self.group.size() if self.sequence_parallel and self.group is not None else 1
        shards *= 1 if self.context_group is None else self.context_group.size()
        if hidden_sBH.shape[:2] != (num_positions // shards, num_rows):
            own = (hidden_sBH.shape[1], hidden_sBH.shape[0] * shards)
            message = f"targets of tokens {list(targets.shape)} for hidden states of {list(own)}"
            raise DataError.at("batch", message, "pass the tokens that the targets were built from")


class _SumOverContext(torch.autograd.Function):
    """The sum over context-parallel ranks; each rank's gradient is that of its positions.

    The loss is computed on every rank, from the same sums. Its gradient at a rank's part is the
    gradient at the sum: an all-reduce in backward would count it once per rank.
    """

    @staticmethod
    def forward(ctx: Any, logps_Q: Tensor, group: dist.ProcessGroup) -> Tensor:
        summed_Q = logps_Q.clone()
        dist.all_reduce(summed_Q, group=group)
        return summed_Q

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor, None]:
        return grad_Q, None

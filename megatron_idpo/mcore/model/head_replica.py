"""A copy of the output head, for a model chunk that taps layers but does not own the head.

The head is the final norm and this rank's vocabulary shard of the output weight. A chunk without
them gets a `HeadReplica` as a submodule, before DDP wraps the chunk, so that a trainable copy is in
DDP's gradient buffers and in the optimizer like any other parameter. Frozen copies on one rank
share their memory.

In a distributed checkpoint a replica uses the owner's key, with a replica id that is never the main
one: one copy is saved, every copy is loaded.

    V  this tensor-parallel rank's rows of the padded vocabulary   H  hidden size
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_idpo.mcore.model.chunk import (
    ModelChunk,
    RestoreFn,
    final_norm_name,
    new_final_norm,
    parameter_device,
)
from megatron_idpo.mcore.parallel.groups import ModelGroups

REPLICA_NAME = "head_replica"
"""The submodule's name in a chunk, and the prefix of its parameters' names."""


class HeadReplica(torch.nn.Module):
    """Copies of another stage's final norm and output weight.

    Attributes:
        weight: `[V, H]`; None if the chunk has the weight itself (a tied embedding).
        norm: copy of the final norm.
    """

    def __init__(
        self,
        chunk: ModelChunk,
        groups: ModelGroups,
        *,
        with_weight: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the copy, uninitialized: the plugin fills it from the owner.

        Args:
            chunk: the chunk it will belong to; gives sizes and device.
            groups: of the model.
            with_weight: False if the chunk's own embedding is the output weight.
            dtype: of the output weight; None: `config.params_dtype`, which it need not have.
        """
        super().__init__()
        config, device = chunk.config, parameter_device([chunk])
        self._groups = groups
        self._norm_key = f"decoder.{final_norm_name(chunk)}"
        self.weight_key = (
            "embedding.word_embeddings.weight"
            if chunk.share_embeddings_and_output_weights
            else "output_layer.weight"
        )
        self.norm = new_final_norm(chunk).to(device)
        self.weight: torch.nn.Parameter | None = None
        if with_weight:
            rows = chunk.vocab_size // groups.tensor_size
            self.weight = torch.nn.Parameter(
                torch.empty(
                    rows, config.hidden_size, dtype=dtype or config.params_dtype, device=device
                )
            )
            # The attributes that the owner's weight has. ColumnParallelLinear sets these, so that
            # the gradient norm counts every tensor-parallel shard:
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
            # LanguageModule sets this: `decoupled_lr` applies, and Muon does not.
            setattr(self.weight, "is_embedding_or_output_parameter", True)  # noqa: B010 - not a Tensor field
        for parameter in self.parameters():
            mark_shared_head(parameter, is_owner=False)

    def set_trainable(self, *, weight: bool, norm: bool) -> None:
        """Set `requires_grad` of the copies; the owners must have the same.

        A trainable copy needs its owner's gradient summed with its own on every step; if only one
        of the two were trainable, the copies would drift apart.
        """
        self.norm.requires_grad_(norm)
        if self.weight is not None:
            self.weight.requires_grad_(weight)

    def forward(self) -> None:
        """Use every parameter without computing anything, so that DDP's pre-hooks run.

        With `overlap_param_gather` the pre-hooks of the module that owns a parameter wait for its
        all-gather. The head itself is evaluated in the backward pass, outside any module's forward;
        this call comes before it, in the forward pass.
        """
        with torch.no_grad():
            first = next(self.norm.parameters(), None)
            if first is not None:
                self.norm(first.new_zeros(1, 1, first.numel()))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this copy for a distributed checkpoint."""
        from megatron.core.dist_checkpointing import ShardedTensor

        groups = self._groups
        stage = 1 + torch.distributed.get_rank(groups.pipeline)
        data_rank = torch.distributed.get_rank(groups.data_and_context)
        # megatron-core saves the copy whose replica id is all zeros, the owner's. A replica's first
        # entry is at least 1, so it is never saved. All copies of a shard need different ids: the
        # norm is replicated over tensor-parallel ranks, the weight is sharded over them.
        state = {
            f"{prefix}norm.{name}": ShardedTensor.from_rank_offsets(
                f"{self._norm_key}.{name}",
                parameter,
                replica_id=(stage, groups.tensor_rank, data_rank),
            )
            for name, parameter in self.norm.named_parameters()
        }
        if self.weight is not None:
            state[f"{prefix}weight"] = make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                self.weight_key,
                replica_id=(stage, 0, data_rank),
                # Layouts pad the vocabulary to different sizes.
                allow_shape_mismatch=True,
                tp_group=groups.tensor,
                dp_cp_group=groups.data_and_context,
            )
        return state


def mark_shared_head(parameter: torch.nn.Parameter, *, is_owner: bool) -> RestoreFn:
    """Set megatron-core's attributes for a parameter of which several stages hold a copy.

    `shared_embedding` gives it its own DDP bucket, so that the distributed optimizer cuts it at the
    same elements on every stage and the shards' gradients can be summed over the stages. `shared`
    excludes all copies but the owner's from the gradient norm, which would count them repeatedly.
    """
    names = ("shared_embedding",) if is_owner else ("shared_embedding", "shared")
    # A tied embedding has `shared_embedding` already; restoring must leave it.
    added = [name for name in names if not getattr(parameter, name, False)]
    for name in added:
        setattr(parameter, name, True)

    def restore() -> None:
        for name in added:
            delattr(parameter, name)

    return restore

"""A copy of the output head, on a model chunk that taps layers and does not own the head.

The head is the final norm and this rank's shard of the output weight. A chunk that lacks them gets
a `HeadReplica` as a submodule, before DDP wraps the chunk, so that a trainable copy lies in DDP's
buffers and the optimizer like any parameter. Frozen copies on one rank share their memory.

In a distributed checkpoint a replica carries the owner's key with a replica id that is never the
main one: one copy is saved, every copy is filled on load.

    V  this tensor-parallel rank's rows of the padded vocabulary   H  hidden size
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_idpo.mcore.model.chunk import RestoreFn
from megatron_idpo.mcore.model.specs import final_norm
from megatron_idpo.mcore.parallel.groups import rank_coordinates

REPLICA_NAME = "head_replica"
"""The submodule's name in a chunk, and the prefix of its parameters' names."""


class HeadReplica(torch.nn.Module):
    """Final norm and output weight of another stage.

    Attributes:
        weight: `[V, H]`; None where the chunk has the weight itself (a tied embedding).
        norm: the final norm's copy.
    """

    def __init__(self, chunk: GPTModel, *, with_weight: bool) -> None:
        """Allocate the copy; its values come from the owner, see `fill`.

        Args:
            chunk: the chunk it will belong to, which gives sizes, format and device.
            with_weight: False where the chunk's own embedding serves as the weight.
        """
        super().__init__()
        config = chunk.config
        self.weight_key = (
            "embedding.word_embeddings.weight"
            if chunk.share_embeddings_and_output_weights
            else "output_layer.weight"
        )
        self.norm = final_norm(config)
        self.weight: torch.nn.Parameter | None = None
        if with_weight:
            rows = chunk.vocab_size // config.tensor_model_parallel_size
            self.weight = torch.nn.Parameter(
                torch.empty(
                    rows,
                    config.hidden_size,
                    dtype=config.params_dtype,
                    device=torch.cuda.current_device(),
                )
            )
            # What ColumnParallelLinear says of its own weight.
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
            # And LanguageModule of the owner: a learning rate of its own (`decoupled_lr`), no Muon.
            setattr(self.weight, "is_embedding_or_output_parameter", True)  # noqa: B010 - as above
        for parameter in self.parameters():
            mark_shared_head(parameter, is_owner=False)

    def set_trainable(self, *, weight: bool, norm: bool) -> None:
        """Whether the copies learn; their owners must be set alike."""
        self.norm.requires_grad_(norm)
        if self.weight is not None:
            self.weight.requires_grad_(weight)

    def forward(self) -> None:
        """Do nothing, as a module: enter every parameter, so that DDP waits for its all-gather.

        `overlap_param_gather` waits in the pre-hooks of the module that owns a parameter. The head
        is evaluated in the backward pass; this call comes in the forward pass before it.
        """
        with torch.no_grad():
            self.norm(self.norm_weight.new_zeros(1, 1, self.norm_weight.numel()))

    @property
    def norm_weight(self) -> torch.nn.Parameter:
        """The copy of the norm's weight, `[H]`."""
        weight = self.norm.weight
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this copy for a distributed checkpoint."""
        rank = rank_coordinates()
        # The first number tells copies of one shard apart; only all zeros is the one that is saved.
        copy = (1 + rank.pp_rank, 0, rank.dp_rank)
        state = {
            f"{prefix}norm.weight": _whole_tensor(
                self.norm_weight,
                "decoder.final_layernorm.weight",
                (1 + rank.pp_rank, rank.tp_rank, rank.dp_rank),
            )
        }
        if self.weight is not None:
            state[f"{prefix}weight"] = make_tp_sharded_tensor_for_checkpoint(
                self.weight, self.weight_key, replica_id=copy, allow_shape_mismatch=True
            )
        return state


def mark_shared_head(parameter: torch.nn.Parameter, *, is_owner: bool) -> RestoreFn:
    """Tell megatron-core that several stages hold this parameter.

    `shared_embedding` puts it into a DDP bucket of its own, so that the distributed optimizer cuts
    it at the same places on every stage and the gradients of the parts can be added up. `shared`
    leaves all copies but the owner's out of the gradient's norm.
    """
    wanted = ("shared_embedding",) if is_owner else ("shared_embedding", "shared")
    added = [name for name in wanted if not getattr(parameter, name, False)]
    for name in added:
        setattr(parameter, name, True)

    def undo() -> None:
        for name in added:
            delattr(parameter, name)

    return undo


def _whole_tensor(tensor: Tensor, key: str, replica_id: tuple[int, int, int]) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica_id)

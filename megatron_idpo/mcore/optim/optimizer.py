"""megatron-core's DDP and AdamW around model chunks, set up in one place.

`setup_ddp_and_optimizer` makes both; `TrainableModel` is what a training step needs of them. Gradients
are reduced in fp32, and 16-bit parameters have fp32 main copies. With several data-parallel ranks
the reduction overlaps with the backward pass, and the optimizer's state is split over them (ZeRO-1)
if so wished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

from megatron_idpo.config.training import OptimizerConfig
from megatron_idpo.mcore.parallel.groups import data_parallel_size


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """Model chunks in DDP with their optimizer."""

    model: list[Any]
    """The chunks in DDP, in the order that schedules want them."""

    optimizer: Any
    """A `MegatronOptimizer`."""

    def zero_grad_buffers(self) -> None:
        """Forget the gradients of the step before."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """Clip, update the weights, and tell the norm that the whole gradient had before clipping.

        Collective: the norm is summed over the model's ranks; with a distributed optimizer the
        updated weights are gathered over data-parallel ones.

        Args:
            lr: of this step.

        Returns:
            The norm, the same on every rank; NaN or infinite where a gradient is, and then the
            weights are spoilt too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)


def setup_ddp_and_optimizer(
    chunks: Sequence[GPTModel], settings: OptimizerConfig, finalize_model_grads: Callable[..., None]
) -> TrainableModel:
    """Put chunks into DDP and make an optimizer for what is trainable in them. Collective.

    Args:
        chunks: this rank's, with adapters and taps in place and the weights to start from.
        settings: of AdamW.
        finalize_model_grads: what the schedule calls at the end of a step's gradients.
    """
    config, shards = chunks[0].config, data_parallel_size() > 1
    distributed = settings.distributed and shards
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=shards,
        use_distributed_optimizer=distributed,
    )
    model = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    adam = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=config.params_dtype == torch.bfloat16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(adam, model, get_standard_config_overrides(adam))
    for group in optimizer.param_groups:
        # Its own scheduler would do this; ours has the learning rate only.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return TrainableModel(model, optimizer)

"""megatron-core's DDP and AdamW around model chunks.

Gradients are reduced in fp32, and 16-bit parameters have fp32 main copies. With several
data-parallel ranks the reduction overlaps with the backward pass, and the optimizer state is
sharded over them (ZeRO-1) if the configuration says so. Without pipeline stages, the updated
weights of a whole model are gathered during the next forward pass: a step's or an evaluation's.
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
from megatron_idpo.mcore.optim.multi_tensor import use_foreach_operators
from megatron_idpo.mcore.parallel.groups import data_parallel_size


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """Model chunks in DDP with their optimizer."""

    model: list[Any]
    """The chunks in DDP, in virtual-stage order, as pipeline schedules take them."""

    optimizer: Any
    """A `MegatronOptimizer`."""

    def zero_grad_buffers(self) -> None:
        """Zero DDP's gradient buffers and the optimizer's gradients before a step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """Clip the gradient, update the weights, and return the gradient norm before clipping.

        Collective: the norm is summed over the model-parallel ranks; with a distributed optimizer
        the updated weights are all-gathered over the data-parallel ranks, here or in the next
        forward pass (`gather_weights`).

        Args:
            lr: learning rate of this step.

        Returns:
            The norm, the same on every rank. NaN or inf if a gradient is, and then the updated
            weights are NaN too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)

    def gather_weights(self) -> None:
        """Complete the weights after a step, for code that reads them without a forward pass.

        Collective over the data-parallel ranks, where the next forward pass would gather them.
        """
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)


def setup_ddp_and_optimizer(
    chunks: Sequence[GPTModel], settings: OptimizerConfig, finalize_model_grads: Callable[..., None]
) -> TrainableModel:
    """Wrap chunks in DDP and create an optimizer for their trainable parameters. Collective.

    Args:
        chunks: this rank's, with adapters and taps inserted and the initial weights loaded: the
            fp32 main copies are made here.
        settings: of AdamW.
        finalize_model_grads: called by the schedule after the last micro-batch's backward pass.
    """
    config, has_replicas = chunks[0].config, data_parallel_size() > 1
    distributed = settings.distributed and has_replicas
    # Adapters are gathered in milliseconds, less than the hooks of all modules cost the host.
    matrices = [p for chunk in chunks for p in chunk.parameters() if p.dim() > 1]
    is_whole_model = all(matrix.requires_grad for matrix in matrices)
    # A later stage would gather only when the first activation arrives, in a single bucket: the
    # stages' gathers would follow one another. `step` gathers on all stages at once.
    has_stages = config.pipeline_model_parallel_size > 1
    overlap_param_gather = distributed and is_whole_model and not has_stages
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=has_replicas,
        overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=distributed,
    )
    # Buckets only in the first chunk, as in Megatron-LM's `wrap_with_ddp`: with interleaving, the
    # communication of later chunks is overlapped by the schedule anyway.
    model = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
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
        overlap_param_gather=overlap_param_gather,
    )
    use_foreach_operators()
    optimizer = get_megatron_optimizer(
        adam, model, get_standard_config_overrides(adam), use_gloo_process_groups=False
    )
    for group in optimizer.param_groups:
        # `wd_mult` is 0 for norms and biases. megatron-core applies it in its own parameter
        # scheduler, which we do not use: our schedule sets the learning rate only.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        # The schedule uses these to hold back the reduction until the last micro-batch. Without
        # them DDP starts it in the first one's backward pass, before the other gradients are there.
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return TrainableModel(model, optimizer)

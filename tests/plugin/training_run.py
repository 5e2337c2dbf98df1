"""`megatron_run`: a short training with the plugin on every rank, for comparison with the oracle.

megatron-core's schedule, DDP and optimizer are set up as in a training script.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.objective.dpo import Objective

from .training_case import (
    EPS,
    LR,
    NUM_LAYERS,
    PAIRS,
    SYNCS,
    VOCAB,
    Case,
    Tokens,
    batches_of_pairs,
    pairs_by_row,
)

ROW_MULTIPLE = 8
"""Rows are as long as the fullest one of the step, rounded up to this: there is padding, and the
shards of sequence parallelism are equal."""


def megatron_run(directory: str, case: Case, references: list[dict[int, Tensor]]) -> dict[str, Any]:
    """Train; return this rank's losses of each step, gradients of the first, final weights.

    Args:
        directory: the policy's checkpoint.
        case: how to run.
        references: per step and layer, the reference's log-probabilities of all sequences.
    """
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.model.experts import take_statistics
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.plugin.attach import attach

    checkpoint, architecture = open_hf(Path(directory))
    start_layout(case.layout)
    options = ModelOptions(
        recompute=_recompute(case), router_aux_loss=getattr(case, "router_aux_loss", 0.0)
    )
    chunks = build_model(architecture, case.layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    for name, parameter in (entry for chunk in chunks for entry in chunk.named_parameters()):
        parameter.requires_grad_(_is_trained(name, case.trained))
    dpo = attach(
        chunks,
        layers=case.layers,
        objective=Objective(**case.objective_fields),
        vocab_size=VOCAB,
        use_norm=case.norm == "final",
    )
    wrapped, optimizer = _with_optimizer(chunks, dpo, case)
    losses, gradients, router = [], {}, None
    # One step for each reference.
    for step, (pairs, reference) in enumerate(zip(batches_of_pairs(), references, strict=False)):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        losses.append(_run_step(dpo, wrapped, _rows(dpo, pairs, reference, case)))
        _unscale(chunks, case.loss_scale)
        if step == 0:
            router = take_statistics(chunks, NUM_LAYERS)
            if case.sync.startswith("distributed"):
                _gather_gradients(wrapped)
            gradients = dict(whole_tensors(chunks, architecture, _gradient))
        optimizer.step()
    if case.sync.startswith("distributed"):
        for chunk in wrapped:
            # Wait for the all-gather of the last step's weights.
            chunk.disable_forward_pre_hook(param_sync=True)
    weights = {name: value.clone() for name, value in whole_tensors(chunks, architecture)}
    return {"losses": losses, "gradients": gradients, "weights": weights, "router": router}


def _recompute(case: Case) -> Any:
    from megatron_idpo.mcore.model.build import Recompute

    own_layers = NUM_LAYERS // (case.pipeline * case.virtual)
    return {
        "off": Recompute(),
        "selective": Recompute(granularity="selective"),
        "uniform": Recompute(granularity="full", method="uniform", num_layers=1),
        "block": Recompute(granularity="full", method="block", num_layers=max(1, own_layers // 2)),
    }[case.recompute]


def _is_trained(name: str, trained: str) -> bool:
    """`TRAINED`, in terms of megatron-core's parameter names."""
    if trained == "adapters":
        return "linear_qkv.weight" in name or "linear_fc2.weight" in name
    head = name.startswith(("embedding.", "output_layer.", "decoder.final_layernorm."))
    return trained == "all" or not head


def _unscale(chunks: list[Any], loss_scale: float) -> None:
    """As megatron-core's mixed-precision optimizers do; its fp32 optimizer ignores the scale."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.div_(loss_scale)


def _gradient(parameter: Any) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if main_grad is None else main_grad.clone()


def _with_optimizer(chunks: list[Any], dpo: Any, case: Case) -> tuple[list[Any], Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config, flags = chunks[0].config, SYNCS[case.sync]
    settings = DistributedDataParallelConfig(
        bucket_size=2000,
        align_param_gather="align" in flags,
        **{flag: True for flag in flags if flag != "align"},
    )
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    adam = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        adam_eps=EPS,
        weight_decay=0.0,
        clip_grad=0.0,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(adam, wrapped)
    config.finalize_model_grads_func = dpo.finalize_model_grads
    if case.loss_scale != 1.0:
        config.grad_scale_func = partial(torch.mul, torch.tensor(case.loss_scale))
    if settings.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
    if "align" in flags:
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if "align" in flags and settings.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped, optimizer


def _one_or_all(functions: list[Any]) -> Any:
    """As megatron-core expects them: a list only for several chunks."""
    return functions[0] if len(functions) == 1 else functions


def _gather_gradients(wrapped: list[Any]) -> None:
    """All-gather whole gradients, which the distributed optimizer reduce-scattered."""
    groups = [
        g for chunk in wrapped for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
    ]
    for group in groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def _run_step(dpo: Any, wrapped: list[Any], rows: list[Any]) -> dict[int, Tensor]:
    """Run one global batch through the schedule; return the sum of each local layer's losses."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        batch, inputs = next(iterator)
        return dpo.forward(model, batch, **inputs), partial(dpo.loss, batch)

    with dpo.collect_outputs(len(rows)) as outputs:
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(rows) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(rows),
            seq_length=rows[0].batch.targets.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
    sums: dict[int, Tensor] = {}
    for output in outputs:
        sums[output.layer] = sums.get(output.layer, torch.zeros(())) + output.loss_P.sum()
    return sums


def _rows(dpo: Any, pairs: list[Tokens], reference: dict[int, Tensor], case: Case) -> list[Any]:
    """This data-parallel rank's rows of one global batch."""
    import numpy as np
    from megatron.core import parallel_state

    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.pairs import Pair
    from megatron_idpo.plugin.rows import row_micro_batch

    tokenized = [
        Pair(index, *(np.array(part, dtype=np.int32) for part in pair))
        for index, pair in enumerate(pairs)
    ]
    all_rows = pairs_by_row(case)
    fullest = max(sum(len(part) for n in row for part in pairs[n]) for row in all_rows)
    row_tokens = -(-fullest // ROW_MULTIPLE) * ROW_MULTIPLE
    local_rows = all_rows[parallel_state.get_data_parallel_rank() :: case.data]
    micro_batches = []
    for index, row_pairs in enumerate(local_rows):
        row = Row.build([tokenized[n] for n in row_pairs], row_tokens, 0)
        answers = torch.tensor(
            [2 * pair + side for pair in row_pairs for side in (0, 1)], dtype=torch.int64
        )
        micro_batches.append(
            row_micro_batch(
                row,
                torch.device("cpu"),
                context=dpo.context,
                reference_logps={layer: logps[answers] for layer, logps in reference.items()},
                index=index,
                num_micro_batches=len(local_rows),
                global_pairs=PAIRS,
                mean_chosen_tokens=sum(len(chosen) for _, chosen, _ in pairs) / PAIRS,
            )
        )
    return micro_batches

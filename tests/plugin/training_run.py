"""Three training steps with the plugin, on every rank, by megatron-core's own machinery.

`megatron_run` is what workers run: its schedule, DDP and optimizer as a training script sets them
up. It answers with losses, gradients and weights, to be compared with the oracle's.
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
"""Rows are as long as the fullest one of the step, rounded up: there is padding, and shards of
sequence parallelism are equal."""


def megatron_run(directory: str, case: Case, references: list[dict[int, Tensor]]) -> dict[str, Any]:
    """Three steps; this rank's part of gradients, weights and losses.

    Args:
        directory: the policy's checkpoint.
        case: how to run.
        references: of each step by layer, the reference's log-probabilities of all sequences.
    """
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.plugin.attach import attach

    checkpoint, architecture = open_hf(Path(directory))
    case.layout.start()
    chunks = build_model(architecture, case.layout, ModelOptions(recompute=_recompute(case)))
    load_hf_weights(chunks, checkpoint, architecture)
    for name, parameter in (entry for chunk in chunks for entry in chunk.named_parameters()):
        parameter.requires_grad_(_learns(name, case.trained))
    dpo = attach(
        chunks,
        layers=case.layers,
        objective=Objective(**case.objective_fields),
        vocab_size=VOCAB,
        use_norm=case.norm == "final",
    )
    wrapped, optimizer = _with_optimizer(chunks, dpo, case)
    losses, gradients = [], {}
    for step, pairs in enumerate(batches_of_pairs()):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        losses.append(_run_step(dpo, wrapped, _rows(pairs, references[step], case)))
        _unscale(chunks, case.loss_scale)
        if step == 0:
            if case.sync.startswith("distributed"):
                _gather_gradients(wrapped)
            gradients = dict(whole_tensors(chunks, architecture, _gradient))
        optimizer.step()
    if case.sync.startswith("distributed"):
        for chunk in wrapped:
            # The last step's weights are on the way.
            chunk.disable_forward_pre_hook(param_sync=True)
    weights = {name: value.clone() for name, value in whole_tensors(chunks, architecture)}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def _recompute(case: Case) -> Any:
    from megatron_idpo.mcore.model.build import Recompute

    own_layers = NUM_LAYERS // (case.pipeline * case.virtual)
    return {
        "off": Recompute(),
        "selective": Recompute(granularity="selective"),
        "uniform": Recompute(granularity="full", method="uniform", num_layers=1),
        "block": Recompute(granularity="full", method="block", num_layers=max(1, own_layers // 2)),
    }[case.recompute]


def _learns(name: str, trained: str) -> bool:
    """Whether megatron-core's parameter of this name does; `TRAINED` in its terms."""
    if trained == "adapters":
        return "linear_qkv.weight" in name or "linear_fc2.weight" in name
    head = name.startswith(("embedding.", "output_layer.", "decoder.final_layernorm."))
    return trained == "all" or not head


def _unscale(chunks: list[Any], loss_scale: float) -> None:
    """What megatron-core's mixed-precision optimizers do; its fp32 optimizer knows no scale."""
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

    config, wishes = chunks[0].config, SYNCS[case.sync]
    settings = DistributedDataParallelConfig(
        bucket_size=2000,
        align_param_gather="align" in wishes,
        **{stop_flag: True for stop_flag in wishes if stop_flag != "align"},
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
    if "align" in wishes:
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if "align" in wishes and settings.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped, optimizer


def _one_or_all(functions: list[Any]) -> Any:
    """As megatron-core wants them: a list only if there are several chunks."""
    return functions[0] if len(functions) == 1 else functions


def _gather_gradients(wrapped: list[Any]) -> None:
    """Undo the distributed optimizer's reduce-scatter: all of every gradient on every rank."""
    for group in (group for chunk in wrapped for group in chunk.bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def _run_step(dpo: Any, wrapped: list[Any], rows: list[Any]) -> dict[int, Tensor]:
    """One global batch through megatron-core's schedule; the sum of each local layer's losses."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        tokens_1T, micro_batch = next(iterator)
        return dpo.forward(model, tokens_1T, micro_batch), partial(dpo.loss, micro_batch)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(rows),
        seq_length=rows[0][0].numel(),
        micro_batch_size=1,
        forward_only=False,
    )
    sums: dict[int, Tensor] = {}
    for output in dpo.take_outputs(len(rows)):
        sums[output.layer] = sums.get(output.layer, torch.zeros(())) + output.loss_P.sum()
    return sums


def _rows(pairs: list[Tokens], reference: dict[int, Tensor], case: Case) -> list[Any]:
    """This data-parallel rank's micro-batches of one global batch: tokens and all about them."""
    import numpy as np
    from megatron.core import parallel_state

    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.tokenize.pair import Pair
    from megatron_idpo.plugin.micro_batch import MicroBatch, Targets

    tokenised = [
        Pair(number, *(np.array(part, dtype=np.int32) for part in pair))
        for number, pair in enumerate(pairs)
    ]
    everyones = pairs_by_row(case)
    fullest = max(sum(len(part) for n in row for part in pairs[n]) for row in everyones)
    row_tokens = -(-fullest // ROW_MULTIPLE) * ROW_MULTIPLE
    mine = everyones[parallel_state.get_data_parallel_rank() :: case.data]
    micro_batches = []
    for number, held in enumerate(mine):
        row = Row.build([tokenised[n] for n in held], row_tokens, 0)
        tensors = row.tensors(torch.device("cpu"))
        sequences = [2 * pair + side for pair in held for side in (0, 1)]
        micro_batch = MicroBatch(
            position_ids_T=tensors.position_ids_T,
            spans_G4=tensors.spans_G4,
            targets=Targets(
                tensors.target_positions_N,
                tensors.target_tokens_N,
                tensors.target_sequences_N,
                row.num_pairs,
            ),
            reference_logps={
                layer: logps_2P[torch.tensor(sequences, dtype=torch.int64)]
                for layer, logps_2P in reference.items()
            },
            index=number,
            num_micro_batches=len(mine),
            global_pairs=PAIRS,
        )
        micro_batches.append((tensors.tokens_T[None], micro_batch))
    return micro_batches

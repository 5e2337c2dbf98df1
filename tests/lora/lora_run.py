"""Functions that workers run: build adapters, train them with megatron-core, gather their values.

Whole tensors have PEFT's names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig

from .lora_case import (
    ADAM,
    CLIP,
    NUM_SEQUENCES,
    SEQUENCE_TOKENS,
    SETTINGS,
    STEPS,
    SYNCS,
    Case,
    tokens,
)


def adapted(
    base: str,
    layout: Layout,
    settings: LoraConfig,
    adapter: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[list[Any], Any, Any]:
    """Chunks with a base model's weights, its architecture, and adapters, loaded if given."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.lora.peft import load_peft
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    checkpoint, architecture = open_hf(Path(base))
    start_layout(layout)
    chunks = build_model(architecture, layout, ModelOptions(**options))
    load_hf_weights(chunks, checkpoint, architecture)
    adapters = add_adapters(chunks, architecture, settings, seed)
    if adapter is not None:
        load_peft(adapters, architecture, Path(adapter))
    return chunks, architecture, adapters


def whole(
    adapters: Any, value: Callable[[Any], Tensor] = lambda parameter: parameter.detach()
) -> dict[str, Tensor]:
    """This stage's tensors under PEFT's names, on its first rank; replicas must be equal."""
    from megatron_idpo.lora.expert_tensors import gather_whole
    from megatron_idpo.lora.peft import tensor_name
    from megatron_idpo.mcore.parallel.groups import gather_tensor_shards

    tensors = {}
    for adapter_tensor in adapters.tensors():
        local, split_dim = value(adapter_tensor.parameter), adapter_tensor.split_dim
        name = tensor_name(adapter_tensor, adapters.settings)
        shards = gather_tensor_shards(local, is_expert=adapter_tensor.is_expert)
        if shards is not None and split_dim is None:
            assert all(torch.equal(shards[0], shard) for shard in shards), f"{name} differs"
        if adapter_tensor.is_expert:
            experts = gather_whole(replace(adapter_tensor, parameter=local))
            tensors |= {} if experts is None else {name: experts}
        elif shards is not None:
            tensors[name] = shards[0] if split_dim is None else torch.cat(shards, split_dim)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def merged(parts: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    """The entries of all ranks in one dict."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def logits_of(chunk: Any, sequences: Tensor) -> Tensor:
    """A single chunk's logits of sequences, `[sequences, tokens, vocabulary shard]`."""
    from megatron_idpo.mcore.attention.row_params import RowParams

    count = sequences.shape[1]
    positions, row = torch.arange(count)[None], RowParams.plain(count)
    rows = [sequence[None] for sequence in sequences]
    return torch.cat([chunk(tokens, positions, None, packed_seq_params=row) for tokens in rows])


def train(base: str, adapter: str, case: Case) -> dict[str, Any]:
    """Train; return this rank's part of the logits, first gradients, norms and final adapters."""
    from megatron_idpo.mcore.model.build import Recompute

    recompute = Recompute(granularity=case.recompute)  # type: ignore[arg-type]
    settings = SETTINGS[case.settings]
    chunks, architecture, adapters = adapted(
        base, case.layout, settings, adapter, recompute=recompute
    )
    frozen = {name: p.clone() for name, p in _base_parameters(chunks)}
    wrapped, optimizer = _with_optimizer(chunks, case)
    result: dict[str, Any] = {"norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        logits = _run(wrapped, architecture.vocab_size, step)
        if step == 0:
            result["logits"] = logits
            if case.sync != "distributed":
                result["gradients"] = whole(adapters, lambda parameter: parameter.main_grad)
        result["norms"].append(float(optimizer.step()[1]))
    if case.sync == "distributed":
        for chunk in wrapped:
            # Wait for the all-gather of the last step's weights.
            chunk.disable_forward_pre_hook(param_sync=True)
    assert all(torch.equal(frozen[name], p) for name, p in _base_parameters(chunks))
    return result | {"adapters": whole(adapters)}


def _base_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    from megatron_idpo.mcore.model.build import global_parameters

    for name, parameter in global_parameters(chunks):
        assert not parameter.requires_grad and parameter.grad is None, name
        assert getattr(parameter, "main_grad", None) is None, name
        yield name, parameter.detach()


def gradients_in_bf16(base: str, adapter: str, case: Case) -> dict[str, Tensor]:
    """This rank's part of the first gradients of a model in bf16."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_idpo.mcore.model.build import Recompute

    chunks, architecture, adapters = adapted(
        base,
        case.layout,
        SETTINGS[case.settings],
        adapter,
        dtype=torch.bfloat16,
        recompute=Recompute(granularity=case.recompute),  # type: ignore[arg-type]
    )
    wrapped = _wrapped(chunks, grad_reduce_in_fp32=True)
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    _run(wrapped, architecture.vocab_size, step=0)
    return whole(adapters, lambda parameter: parameter.main_grad)


def _wrapped(chunks: list[Any], **fields: Any) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(bucket_size=2000, **fields)
    return [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]


def _with_optimizer(chunks: list[Any], case: Case) -> tuple[list[Any], Any]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = _wrapped(chunks, **dict.fromkeys(SYNCS[case.sync], True))
    config, settings = chunks[0].config, wrapped[0].ddp_config
    adam = OptimizerConfig(
        optimizer="adam",
        lr=ADAM["lr"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_eps=ADAM["eps"],
        weight_decay=0.0,
        clip_grad=CLIP,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(adam, wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs[0] if len(syncs) == 1 else syncs
    return wrapped, optimizer


def _run(wrapped: list[Any], vocab_size: int, step: int) -> dict[int, Tensor]:
    """Forward and backward on megatron-core's schedule; return the logits by sequence."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_idpo.mcore.attention.row_params import RowParams

    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    sequences = tokens(vocab_size, step)
    local = [(index, sequences[index][None]) for index in range(rank, NUM_SEQUENCES, size)]
    collected: dict[int, Tensor] = {}

    def loss(index: int, labels: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gathered = gather_from_tensor_model_parallel_region(logits)[..., :vocab_size]
        collected[index] = gathered.detach().clone()
        return torch.nn.functional.cross_entropy(gathered.flatten(0, 1), labels.flatten()), {}

    def forward(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        index, sequence = next(iterator)
        positions = torch.arange(SEQUENCE_TOKENS)[None]
        row = RowParams.plain(SEQUENCE_TOKENS)
        output = model(sequence[:, :-1], positions, None, packed_seq_params=row)
        return output, partial(loss, index, sequence[:, 1:])

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(local) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(local),
        seq_length=SEQUENCE_TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    return collected

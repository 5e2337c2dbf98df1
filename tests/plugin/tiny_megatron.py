"""A tiny model on this rank, rows for it and a schedule, without any files.

Every weight is a function of its name in the whole model, so the model is the same in every
pipeline layout. Tensor-parallel shards are random each; they are not parts of one matrix.

    P  pairs   T  row positions
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout

NUM_LAYERS, VOCAB, ROW_TOKENS = 4, 51, 24
PAIRS_BY_ROW = ((0, 1), (2,), (), (3,))
"""Four micro-batches, one of them empty."""

PAIRS = 4
SIZES = {
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
HEAD = ("embedding.", "output_layer.", "decoder.final_layernorm.")


def start(
    layout: Layout | None = None,
    *,
    tied: bool = False,
    frozen_head: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> list[Any]:
    """Start a layout and build this rank's chunks."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = layout or Layout()
    start_layout(layout)
    return chunks_of(layout, tied=tied, frozen_head=frozen_head, dtype=dtype, **overrides)


def chunks_of(
    layout: Layout,
    *,
    tied: bool = False,
    frozen_head: bool = False,
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
    fields: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> list[Any]:
    """Build this rank's chunks in a running layout."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model, global_parameters
    from megatron_idpo.testing import tiny_hf_config

    architecture = Architecture.from_hf(
        tiny_hf_config(family, tie_word_embeddings=tied, **SIZES, **fields or {})
    )
    chunks = build_model(architecture, layout, ModelOptions(dtype=dtype, overrides=overrides))
    for name, parameter in global_parameters(chunks):
        parameter.data.copy_(weight_of(name, parameter, tied))
        if frozen_head and name.startswith(HEAD):
            parameter.requires_grad_(False)
    return chunks


def weight_of(name: str, parameter: Tensor, tied: bool) -> Tensor:
    """The values of the parameter of this name."""
    from megatron_idpo.mcore.parallel.groups import rank_coordinates

    if tied and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    if getattr(parameter, "tensor_model_parallel", False):
        name += str(rank_coordinates().tp_rank)
    generator = torch.Generator().manual_seed(sum(n * b for n, b in enumerate(name.encode(), 1)))
    shape = tuple(parameter.shape)
    return 0.2 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)


def references(layers: Sequence[int]) -> dict[int, Tensor]:
    """Reference log-probabilities of all sequences, by layer."""
    generator = torch.Generator().manual_seed(3)
    return {layer: -20 - 5 * torch.rand(2 * PAIRS, generator=generator) for layer in layers}


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected answer of each pair."""
    rng = random.Random(7)
    parts = iter([rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))] for _ in range(3 * PAIRS))
    return list(zip(parts, parts, parts, strict=True))


def tokenized_pairs() -> list[Any]:
    """`pairs` as `Pair`s."""
    import numpy as np

    from megatron_idpo.data.pairs import Pair

    return [
        Pair(n, *(np.array(part, dtype=np.int32) for part in pair))
        for n, pair in enumerate(pairs())
    ]


def micro_batches(reference: Mapping[int, Tensor] | None, **fields: Any) -> list[Any]:
    """This data-parallel rank's rows as (batch, inputs); `fields` replace the batch's defaults."""
    from megatron.core import parallel_state

    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.plugin.rows import row_micro_batch

    tokenized = tokenized_pairs()
    micro_batches = []
    size = parallel_state.get_data_parallel_world_size()
    rows = PAIRS_BY_ROW[parallel_state.get_data_parallel_rank() :: size]
    for index, row_pairs in enumerate(rows):
        row = Row.build([tokenized[n] for n in row_pairs], ROW_TOKENS, 0)
        answers = torch.tensor(
            [2 * n + side for n in row_pairs for side in (0, 1)], dtype=torch.int64
        )
        defaults = {
            "reference_logps": {
                layer: logps[answers] for layer, logps in (reference or {}).items()
            },
            "index": index,
            "num_micro_batches": len(rows),
            "global_pairs": PAIRS,
        }
        micro_batches.append(row_micro_batch(row, torch.device("cpu"), **{**defaults, **fields}))
    return micro_batches


def run(dpo: Any, models: Sequence[Any], batches: Sequence[Any], **schedule: Any) -> list[Any]:
    """Run micro-batches through megatron-core's schedule; `schedule` replaces its arguments.

    Returns the outputs of this rank's layers.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        batch, inputs = next(iterator)
        return dpo.forward(model, batch, **inputs), partial(dpo.loss, batch)

    arguments = {
        "data_iterator": [iter(batches) for _ in models],
        "model": list(models),
        "num_microbatches": len(batches),
        "seq_length": ROW_TOKENS,
        "micro_batch_size": 1,
        "forward_only": False,
        **schedule,
    }
    # megatron-core's schedules leave gradients enabled with forward_only.
    with (
        torch.set_grad_enabled(not arguments["forward_only"]),
        dpo.collect_outputs(arguments["num_microbatches"]) as outputs,
    ):
        get_forward_backward_func()(forward_step_func=step, **arguments)
    return outputs


def wrap(dpo: Any, chunks: Sequence[Any], **settings: Any) -> list[Any]:
    """Wrap the chunks in DDP and let the plugin finish gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = chunks[0].config
    config.finalize_model_grads_func = dpo.finalize_model_grads
    ddp = DistributedDataParallelConfig(**{"bucket_size": 2000, **settings})
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def gradients(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Gradients of this rank's parameters, by their names in the whole model."""
    from megatron_idpo.mcore.model.build import global_parameters

    return {
        name: parameter.main_grad.clone()
        for name, parameter in global_parameters(chunks)
        if parameter.requires_grad
    }


def by_layer(outputs: Sequence[Any], field: str) -> dict[int, Tensor]:
    """A field of the outputs of each layer, concatenated over micro-batches."""
    ordered = sorted(outputs, key=lambda output: (output.layer, output.micro_batch))
    layers = sorted({output.layer for output in ordered})
    return {
        layer: torch.cat([getattr(out, field) for out in ordered if out.layer == layer])
        for layer in layers
    }


def merged(by_rank: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    """The entries of all ranks in one dict."""
    return {name: tensor for of_rank in by_rank for name, tensor in of_rank.items()}


def batch_of(rows: Sequence[Sequence[int]]) -> Any:
    """A `Batch` whose rows hold these pairs, `PAIRS` in total."""
    from megatron_idpo.data.packing.batches import Batch
    from megatron_idpo.data.packing.rows import Row

    tokenized = tokenized_pairs()
    built = tuple(Row.build([tokenized[n] for n in row], ROW_TOKENS, 0) for row in rows)
    return Batch(
        rows=built,
        num_pairs=PAIRS,
        consumed_pairs=0,
        used_tokens=0,
        chosen_tokens=0,
        computed_tokens=0,
    )

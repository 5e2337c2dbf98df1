"""Results for the same preference pairs: Megatron's from packed rows, Transformers' one by one.

Each gives the log-probability of every sequence, and all gradients of a randomly weighted sum of
them, under Hugging Face names. Transformers sees prompt+chosen and prompt+rejected, one at a time
and unpadded, so the reference knows neither rows nor pairs. The objective is not tested here: any
loss reaches the model through these log-probabilities.

Embeddings are trained here; frozen ones under recompute are tested with the adapters.

Shapes: P pairs, T row positions, N response tokens of a row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.data.packing.batches import RowSettings, build_batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import Pair

PAD_TOKEN = 3
"""A token that answers contain: padding must not reach its embedding's gradient."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "off": {},
    "selective": {"granularity": "selective"},
    "uniform": {"granularity": "full", "method": "uniform", "num_layers": 1},
    "block": {"granularity": "full", "method": "block", "num_layers": 1},
}


@dataclass(frozen=True)
class Run:
    """One model on some pairs; the layout is that of the worker call."""

    directory: Path
    pairs: list[Pair]
    row_tokens: int
    share_prompt: bool = True
    recompute: str = "off"


@dataclass(frozen=True)
class Answer:
    """The compared values; each rank of Megatron has a part of them."""

    logps: dict[int, Tensor]
    """By pair index, fp64 [2]: chosen, rejected."""

    gradients: dict[str, Tensor]
    """By Hugging Face name, unsharded."""


class _Pairs(list[Pair]):
    """Pairs in memory as a `PairSource`."""

    @property
    def lengths_P3(self) -> NDArray[np.int64]:
        parts = ((p.prompt_tokens, p.chosen_tokens, p.rejected_tokens) for p in self)
        return np.array([[len(tokens) for tokens in part] for part in parts])


def packed_rows(
    pairs: Sequence[Pair], row_tokens: int, *, share_prompt: bool, multiple: int = 1
) -> list[Row]:
    """The pairs in rows as packed for a batch, with an additional empty row."""
    settings = RowSettings(row_tokens=row_tokens, pad_token=PAD_TOKEN, share_prompt=share_prompt)
    batch = build_batch(_Pairs(pairs), np.arange(len(pairs)), settings, consumed_pairs=len(pairs))
    rows, empty = list(batch.rows), Row.empty(batch.row_tokens, PAD_TOKEN)
    rows.insert(1, empty)
    return rows + [empty] * (-len(rows) % multiple)


def _weights(num_pairs: int) -> Tensor:
    """The factor of each sequence's log-probability in the loss, fp64 [P, 2]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_pairs, 2, generator=generator, dtype=torch.float64)


def _sequence_logps(
    logits_NV: Tensor, tokens_N: Tensor, sequences_N: Tensor, num_sequences: int
) -> Tensor:
    """Log-probability of each sequence from the logits that predict its tokens.

    Summed in fp64: at -1000 nats, fp32 rounding is already half the tolerance.
    """
    token_logps_N = logits_NV.log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    zeros = torch.zeros(num_sequences, dtype=torch.float64)
    return zeros.index_add(0, sequences_N, token_logps_N.double())


# ---- Transformers --------------------------------------------------------------------------------


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make tiny models ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def single_answer(directory: Path, pairs: Sequence[Pair]) -> Answer:
    """Each sequence on its own, without padding, through Transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", pad_token_id=None
    )
    logps = {}
    for pair, weights_2 in zip(pairs, _weights(len(pairs)), strict=True):
        both = []
        for answer in (pair.chosen_tokens, pair.rejected_tokens):
            tokens = torch.from_numpy(np.concatenate([pair.prompt_tokens, answer])).long()
            logits = model(tokens[None]).logits[0, len(pair.prompt_tokens) - 1 : -1]
            targets = tokens[len(pair.prompt_tokens) :]
            both.append(_sequence_logps(logits, targets, torch.zeros_like(targets), 1))
        logps_2 = torch.cat(both)
        (logps_2 * weights_2).sum().backward()
        logps[pair.index] = logps_2.detach()
    return Answer(logps, {name: weight.grad for name, weight in model.named_parameters()})


# ---- Megatron, on every rank ---------------------------------------------------------------------


def packed_answers(layout: Layout, runs: Sequence[Run]) -> list[Answer]:
    """This rank's part of each run's answer."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(layout)
    return [_packed_answer(layout, run) for run in runs]


def _packed_answer(layout: Layout, run: Run) -> Answer:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model

    checkpoint, architecture = open_hf(run.directory)
    options = ModelOptions(recompute=Recompute(**RECOMPUTE[run.recompute]))
    chunks = build_model(architecture, layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    config = chunks[0].config
    settings = DistributedDataParallelConfig(use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    rows = packed_rows(
        run.pairs, run.row_tokens, share_prompt=run.share_prompt, multiple=layout.pipeline
    )
    weights_by_index = dict(
        zip((pair.index for pair in run.pairs), _weights(len(run.pairs)), strict=True)
    )
    logps = _run_schedule(wrapped, rows, weights_by_index, architecture.vocab_size)
    gradients = dict(whole_tensors(chunks, architecture, lambda weight: weight.main_grad))
    return Answer(logps, {name: value.clone() for name, value in gradients.items()})


def _run_schedule(
    wrapped: list[Any], rows: list[Row], weights_by_index: dict[int, Tensor], vocab_size: int
) -> dict[int, Tensor]:
    """Forward and backward over the rows; on the last stage the log-probabilities by pair index."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_idpo.mcore.attention.row_params import RowParams

    collected: dict[int, Tensor] = {}

    def loss(row: Row, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        whole_TV = gather_from_tensor_model_parallel_region(logits)[0, :, :vocab_size]
        logps_S = _sequence_logps(
            whole_TV[torch.from_numpy(row.target_positions_N)],
            torch.from_numpy(row.target_tokens_N),
            torch.from_numpy(row.target_sequences_N),
            2 * row.num_pairs,
        )
        indices = row.pair_index_P.tolist()
        collected.update(zip(indices, logps_S.detach().view(-1, 2), strict=True))
        weights_S = torch.cat([weights_by_index[index] for index in indices] or [logps_S.detach()])
        # The schedule divides by the number of rows, for a mean over them.
        return (logps_S * weights_S).sum() * len(rows), {}

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        row = next(iterator)
        position_ids_T = torch.from_numpy(row.position_ids_T)
        output = model(
            torch.from_numpy(row.tokens_T)[None],
            position_ids_T[None],
            None,
            packed_seq_params=RowParams.of(position_ids_T, torch.from_numpy(row.spans_G4)),
        )
        return output, partial(loss, row)

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(rows),
        seq_length=len(rows[0].tokens_T),
        micro_batch_size=1,
        forward_only=False,
    )
    return collected

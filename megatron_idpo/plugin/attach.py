"""`attach`: intermediate DPO for any Megatron-Core training script.

    chunks = ...                                  # GPTModel chunks of this rank, weights loaded
    dpo = attach(chunks, layers=[22], objective=Objective(...), vocab_size=32000)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    config.finalize_model_grads_func = dpo.finalize_model_grads

    def forward_step(iterator, model):
        tokens_1T, micro_batch = next(iterator)   # the same row on every stage
        output = dpo.forward(model, tokens_1T, micro_batch)
        return output, partial(dpo.loss, micro_batch)

    forward_backward(forward_step_func=forward_step, num_microbatches=M, ...)
    outputs = dpo.take_outputs(M)                 # this stage's layers
    dpo.detach()

With B pairs in the global batch, M micro-batches and D data-parallel ranks, the final layer's loss
of a micro-batch is `(1 - w) * sum(L) * M * D / B`, of which the schedule takes a M-th and DDP a
D-th; a tapped layer's is `w * share * sum(L) * D / B * grad_scale`, where no schedule divides.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.build import GPTModel, finalize_model_grads
from megatron_idpo.mcore.model.chunk import (
    Undo,
    chunk_layers,
    enable_embedding_output_grad,
    enter_output_layer,
    tap_layers,
)
from megatron_idpo.mcore.parallel.groups import data_parallel_size, this_rank
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.objective.layers import LayerSpec, resolve_layers
from megatron_idpo.plugin.compatibility import (
    agreed_problems,
    refused_chunks,
    refused_recompute,
    refused_settings,
    refused_vocabulary,
    second_attach,
)
from megatron_idpo.plugin.head import Head
from megatron_idpo.plugin.injection import inject_loss
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.plugin.micro_batch import MicroBatch
from megatron_idpo.plugin.output_buffer import OutputBuffer
from megatron_idpo.plugin.shared_head import SharedHead


def attach(
    chunks: Sequence[GPTModel],
    *,
    layers: LayerSpec,
    objective: Objective,
    vocab_size: int,
    use_norm: bool = True,
) -> "AttachedDpo":
    """Add intermediate DPO to this rank's model chunks. Collective over the world.

    Args:
        chunks: `GPTModel`s with their weights loaded, not yet wrapped in DDP.
        layers: the tapped layers, as `resolve_layers` takes them: numbers from 1, depth fractions,
            `{"every": n}`, `"all"`; empty is plain DPO.
        objective: the loss of a layer and how layers are weighed.
        vocab_size: tokens of the vocabulary, without the rows that pad it.
        use_norm: read tapped layers through the final norm.

    Raises:
        ConfigError: on every rank. Chunks that are wrapped or do not understand rows; layers that
            do not exist or are the final one; and, all at once, a second attach and settings of
            megatron-core under which the gradient would be silently wrong.
    """
    if refused := refused_chunks(chunks):
        raise ConfigError.of(refused)
    config = chunks[0].config
    by_chunk = [chunk_layers(chunk) for chunk in chunks]
    taps = resolve_layers(layers, config.num_layers)
    problems = [
        *second_attach(chunks),
        *refused_settings(config),
        *refused_recompute(config, taps, by_chunk),
        *refused_vocabulary(chunks, vocab_size),
    ]
    arguments = (taps, objective, vocab_size, use_norm)
    if problems := agreed_problems(problems, chunks, taps, arguments):
        raise ConfigError.of(problems)
    return AttachedDpo(chunks, taps, by_chunk, objective, vocab_size, use_norm)


class AttachedDpo:
    """Intermediate DPO on this rank's chunks, until `detach`. Made by `attach`."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        taps: Sequence[int],
        by_chunk: Sequence[Sequence[int]],
        objective: Objective,
        vocab_size: int,
        use_norm: bool,
    ) -> None:
        """Add heads and hooks; `attach` has checked the arguments."""
        self.layers = list(taps)
        """The tapped layers of the whole model, counted from 1."""
        self.num_layers: int = chunks[0].config.num_layers
        """The final layer's number."""
        self.reads_final_reference = bool(taps) and objective.reference_layer == "final"
        """Whether every tapped stage needs what the reference says at the final layer."""
        self._objective = objective
        final_scale, scales = objective.layer_scales(len(taps))
        self._scales = {**dict(zip(taps, scales, strict=True)), self.num_layers: final_scale}
        self._config = chunks[0].config
        self._data_size = data_parallel_size()
        self._chunks = list(chunks)
        self._vocab_size = vocab_size
        tapped = [[layer for layer in taps if layer in owned] for owned in by_chunk]
        local = [layer for layers in tapped for layer in layers]
        is_last = any(chunk.post_process for chunk in chunks)
        self._ledger = OutputBuffer(
            [*local, *([self.num_layers] if is_last else [])],
            self.num_layers,
            counts_pairs=is_last and this_rank().tensor == 0,
        )
        self._is_checked = False
        self._sum_is_due = False
        self._shared_head = SharedHead(
            chunks, [bool(layers) for layers in tapped], use_norm=use_norm
        )
        self._undo: list[Undo] = []
        for number, chunk in enumerate(chunks):
            head = self._shared_head.head(number, vocab_size=vocab_size)
            self._undo += self._hook(chunk, head, tapped[number])

    def _hook(self, chunk: GPTModel, head: Head | None, layers: Sequence[int]) -> list[Undo]:
        undo = []
        if chunk.pre_process:
            undo.append(enable_embedding_output_grad(chunk))
        if layers:
            assert head is not None
            undo.append(tap_layers(chunk, layers, partial(self._on_taps, head)))
        if chunk.post_process:
            assert head is not None
            read_final = partial(head.sequence_logps, normed=True)
            undo.append(enter_output_layer(chunk, read_final))
        return undo

    # ---- what a training script calls -----------------------------------------------------------

    def forward(self, model: Any, tokens_1T: Tensor, micro_batch: MicroBatch) -> Tensor:
        """One micro-batch through one model chunk.

        Args:
            model: a chunk, wrapped or not.
            tokens_1T: int64 `[1, T]`.
            micro_batch: the row's structure, targets and reference log-probabilities.

        Returns:
            What the chunk passes on; on the last stage the sequence log-probabilities `[2P]`.

        Raises:
            ConfigError: not a chunk that this object is attached to, or no `MicroBatch`.
            DataError: tokens of another row, or targets beyond the vocabulary.
        """
        self._check_call(model, tokens_1T, micro_batch)
        output: Tensor = model(
            tokens_1T,
            micro_batch.position_ids_T[None],
            None,
            packed_seq_params=micro_batch,
            output_processor=_sequence_logps,
        )
        return output

    def loss(self, micro_batch: MicroBatch, logps_2P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The final layer's part of the loss, as megatron-core's `loss_func` on the last stage.

        Returns:
            `(1 - w) * sum(L) * M * D / B` (see the module), and nothing to report: outputs are
            taken by `take_outputs`. Outside training 0.

        Raises:
            ConfigError: in training, a micro-batch without the reference's log-probabilities or
                without counts.
        """
        loss_P = self._layer_loss(self.num_layers, micro_batch, logps_2P)
        if loss_P is None or not torch.is_grad_enabled():
            return logps_2P.new_zeros(()), {}
        scale = self._scale_of_pair(self.num_layers, micro_batch)
        return loss_P.sum() * (scale * micro_batch.num_micro_batches), {}

    def finalize_model_grads(self, model: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """megatron-core's `finalize_model_grads`, then the sum over the copies of a trained head.

        To be set as `TransformerConfig.finalize_model_grads_func`. Collective.

        Raises:
            ConfigError: in the first step, on every rank: the step had another number of pairs than
                the losses were averaged over, or the copies of the head are not equal.
        """
        finalize_model_grads(model, *args, **kwargs)
        if not self._is_checked:
            self._ledger.check_pairs()
            self._shared_head.check_equal()
            self._is_checked = True
        self._shared_head.sum_gradients()
        self._sum_is_due = False

    def take_outputs(self, num_micro_batches: int) -> list[LayerOutput]:
        """What this rank's layers said since the last call, and forget it.

        Args:
            num_micro_batches: how many ran; every layer of this rank must have spoken as often.

        Raises:
            ConfigError: a layer did not: its chunk was not run, or not through `forward`; or the
                gradients of a trained head's copies were left apart.
        """
        outputs = self._ledger.take(num_micro_batches)
        if self._sum_is_due:
            raise ConfigError.at(
                "TransformerConfig.finalize_model_grads_func",
                "has not added up the gradients of the head's copies on other stages",
                "set it to AttachedDpo.finalize_model_grads",
            )
        return outputs

    def detach(self) -> None:
        """Put the chunks back as they were, without copies of the head. A second call does nothing.

        DDP and optimizers made meanwhile know the copies: make new ones to train on.
        """
        while self._undo:
            self._undo.pop()()
        self._shared_head.remove(self._chunks)
        self._chunks = []

    # ---- what happens at a tap ------------------------------------------------------------------

    def _on_taps(
        self, head: Head, output: Tensor, hidden: dict[int, Tensor], micro_batch: Any
    ) -> Tensor:
        _check_micro_batch(micro_batch)
        head.enter()
        for layer, hidden_t1H in hidden.items():
            if torch.is_grad_enabled():
                evaluate = partial(self._tapped_loss, head, layer, micro_batch)
                output = inject_loss(output, hidden_t1H, evaluate)
            else:
                logps_2P = head.sequence_logps(hidden_t1H, micro_batch.targets, normed=False)
                self._layer_loss(layer, micro_batch, logps_2P)
        return output

    def _tapped_loss(
        self, head: Head, layer: int, micro_batch: MicroBatch, hidden_t1H: Tensor
    ) -> Tensor:
        logps_2P = head.sequence_logps(hidden_t1H, micro_batch.targets, normed=False)
        loss_P = self._layer_loss(layer, micro_batch, logps_2P)
        assert loss_P is not None
        loss = loss_P.sum() * self._scale_of_pair(layer, micro_batch)
        # The schedule scales the last stage's loss only; ours has to be scaled alike (fp16).
        grad_scale = self._config.grad_scale_func
        return loss if grad_scale is None else grad_scale(loss)

    def _layer_loss(self, layer: int, micro_batch: MicroBatch, logps_2P: Tensor) -> Tensor | None:
        """Each pair's loss at a layer, recorded; None where there is no reference to compare to."""
        read = layer if self._objective.reference_layer == "same" else self.num_layers
        reference_2P = micro_batch.reference_logps.get(read)
        loss_P = None
        if reference_2P is not None or micro_batch.reference_free:
            lengths_2P = micro_batch.targets.lengths()
            loss_P = layer_loss(logps_2P, reference_2P, lengths_2P, self._objective)
        elif torch.is_grad_enabled():
            raise ConfigError.at(
                f"micro-batch {micro_batch.index}",
                f"brings no reference log-probabilities for layer {read}",
                "score the data with the reference at every tapped layer and the final one first; "
                "scoring itself runs under torch.no_grad",
            )
        kept = None if loss_P is None else loss_P.detach()
        self._ledger.record(
            LayerOutput(layer, micro_batch.index, logps_2P.detach(), reference_2P, kept)
        )
        return loss_P

    def _scale_of_pair(self, layer: int, micro_batch: MicroBatch) -> float:
        """The share of a pair's loss at a layer in the gradient, where no schedule divides."""
        self._ledger.record_trained(layer, micro_batch)
        self._sum_is_due = self._shared_head.learns
        return self._scales[layer] * self._data_size / micro_batch.global_pairs

    def _check_call(self, model: Any, tokens_1T: Tensor, micro_batch: object) -> None:
        chunk = model
        while hasattr(chunk, "module"):
            chunk = chunk.module
        if not any(chunk is own for own in self._chunks):
            message = f"this {type(chunk).__name__} is not attached to, or not any more"
            raise ConfigError.at("AttachedDpo.forward", message, "attach to it")
        _check_micro_batch(micro_batch).check_tokens(tokens_1T, self._vocab_size)


def _sequence_logps(
    *, hidden_states: Tensor, output_layer: Any, packed_seq_params: Any, **_: Any
) -> Tensor:
    """megatron-core's `output_processor`: enter the output layer, which `attach` has made ours."""
    logps_2P: Tensor = output_layer(hidden_states, response_targets=packed_seq_params.targets)
    return logps_2P


def _check_micro_batch(micro_batch: object) -> MicroBatch:
    if isinstance(micro_batch, MicroBatch):
        return micro_batch
    raise ConfigError.at(
        "packed_seq_params",
        f"is a {type(micro_batch).__name__}; a tapped chunk needs its MicroBatch",
        "call the model through AttachedDpo.forward",
    )

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

Loss scaling. With B pairs in the global batch, M micro-batches per rank and D data-parallel ranks,
every pair must weigh 1/B in the gradient, independent of its row. megatron-core averages: the
schedule divides the final layer's loss by M, DDP divides gradients by D. So the final layer's loss
of a micro-batch is `(1 - w) * sum(L) * M * D / B`. A tapped layer's loss does not pass through the
schedule, so it has no M, but has to apply the loss scale itself: `w * share * sum(L) * D / B *
grad_scale`.

    T  row positions (t: this rank's shard under sequence parallelism)   H  hidden size   P  pairs
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.build import GPTModel, finalize_model_grads
from megatron_idpo.mcore.model.chunk import (
    RestoreFn,
    chunk_layer_numbers,
    enable_embedding_output_grad,
    override_output_layer,
    tap_layers,
)
from megatron_idpo.mcore.parallel.groups import data_parallel_size, rank_coordinates
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.objective.layers import LayerSpec, resolve_layers
from megatron_idpo.plugin.compatibility import (
    check_all_ranks,
    check_chunks,
    check_not_attached,
    check_recompute,
    check_settings,
    check_vocabulary,
)
from megatron_idpo.plugin.head import Head
from megatron_idpo.plugin.injection import inject_loss
from megatron_idpo.plugin.micro_batch import MicroBatch
from megatron_idpo.plugin.outputs import LayerOutput, OutputBuffer
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
        layers: the tapped layers, as `resolve_layers` takes them: layer numbers from 1, depth
            fractions, `{"every": n}`, `"all"`; empty is plain DPO.
        objective: the loss of a layer and the weights of the layers.
        vocab_size: tokens of the vocabulary, without padding rows.
        use_norm: read tapped layers through the final norm.

    Raises:
        ConfigError: on every rank. Chunks that are wrapped or do not support rows; layers that do
            not exist or are the final one; and, all at once, a second attach and settings of
            megatron-core under which the gradient would be silently wrong.
    """
    if problems := check_chunks(chunks):
        raise ConfigError.of(problems)
    config = chunks[0].config
    layers_by_chunk = [chunk_layer_numbers(chunk) for chunk in chunks]
    taps = resolve_layers(layers, config.num_layers)
    problems = [
        *check_not_attached(chunks),
        *check_settings(config),
        *check_recompute(config, taps, layers_by_chunk),
        *check_vocabulary(chunks, vocab_size),
    ]
    arguments = (taps, objective, vocab_size, use_norm)
    if problems := check_all_ranks(problems, chunks, taps, arguments):
        raise ConfigError.of(problems)
    return AttachedDpo(chunks, taps, layers_by_chunk, objective, vocab_size, use_norm)


class AttachedDpo:
    """Intermediate DPO on this rank's chunks, until `detach`. Created by `attach`."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        taps: Sequence[int],
        layers_by_chunk: Sequence[Sequence[int]],
        objective: Objective,
        vocab_size: int,
        use_norm: bool,
    ) -> None:
        """Add heads and hooks; `attach` has checked the arguments."""
        self.layers = list(taps)
        """The tapped layers of the whole model, counted from 1."""
        self.num_layers: int = chunks[0].config.num_layers
        """The final layer."""
        self.reads_final_reference = bool(taps) and objective.reference_layer == "final"
        """Whether every tapped stage needs the reference's log-probabilities of the final layer."""
        self._objective = objective
        final_scale, scales = objective.layer_scales(len(taps))
        self._scales = {**dict(zip(taps, scales, strict=True)), self.num_layers: final_scale}
        self._config = chunks[0].config
        self._data_size = data_parallel_size()
        self._chunks = list(chunks)
        self._vocab_size = vocab_size
        taps_by_chunk = [[layer for layer in taps if layer in owned] for owned in layers_by_chunk]
        local_layers = [layer for of_chunk in taps_by_chunk for layer in of_chunk]
        is_last = any(chunk.post_process for chunk in chunks)
        self._outputs = OutputBuffer(
            [*local_layers, *([self.num_layers] if is_last else [])],
            self.num_layers,
            counts_pairs=is_last and rank_coordinates().tp_rank == 0,
        )
        self._is_checked = False
        self._gradient_sum_pending = False
        self._shared_head = SharedHead(
            chunks, [bool(of_chunk) for of_chunk in taps_by_chunk], use_norm=use_norm
        )
        self._undo: list[RestoreFn] = []
        for index, chunk in enumerate(chunks):
            head = self._shared_head.head(index, vocab_size=vocab_size)
            self._add_hooks(chunk, head, taps_by_chunk[index])

    def _add_hooks(self, chunk: GPTModel, head: Head | None, taps: Sequence[int]) -> None:
        if chunk.pre_process:
            self._undo.append(enable_embedding_output_grad(chunk))
        if taps:
            assert head is not None
            self._undo.append(tap_layers(chunk, taps, partial(self._on_taps, head)))
        if chunk.post_process:
            assert head is not None
            # The decoder of the last chunk ends with the final norm.
            read_final = partial(head.sequence_logps, normed=True)
            self._undo.append(override_output_layer(chunk, read_final))

    # ---- called by the training script ----------------------------------------------------------

    def forward(self, model: Any, tokens_1T: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Run one micro-batch through one model chunk.

        Args:
            model: a chunk, wrapped or not.
            tokens_1T: int64 `[1, T]`.
            micro_batch: the row's structure, targets and reference log-probabilities.

        Returns:
            The chunk's output; on the last stage the sequence log-probabilities `[2P]`.

        Raises:
            ConfigError: the chunk is not attached, or `micro_batch` is not a `MicroBatch`.
            DataError: tokens of another row, or targets beyond the vocabulary.
        """
        self._check_attached(model)
        _check_micro_batch(micro_batch).check_tokens(tokens_1T, self._vocab_size)
        output: Tensor = model(
            tokens_1T,
            micro_batch.position_ids_T[None],
            None,
            packed_seq_params=micro_batch,
            output_processor=_sequence_logps,
        )
        return output

    def loss(self, micro_batch: MicroBatch, logps_2P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The final layer's term of the loss: megatron-core's `loss_func` on the last stage.

        Returns:
            `(1 - w) * sum(L) * M * D / B` (see the module), and an empty report: `take_outputs`
            returns the outputs. 0 outside training.

        Raises:
            ConfigError: in training, a micro-batch without the reference's log-probabilities or
                without counts.
        """
        loss_P = self._layer_loss(self.num_layers, micro_batch, logps_2P)
        if loss_P is None or not torch.is_grad_enabled():
            return logps_2P.new_zeros(()), {}
        # The schedule divides by M, which would make a pair's weight depend on how many rows its
        # batch was packed into.
        scale = self._pair_scale(self.num_layers, micro_batch) * micro_batch.num_micro_batches
        return loss_P.sum() * scale, {}

    def finalize_model_grads(self, model: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """megatron-core's `finalize_model_grads`, then the sum over the copies of a trained head.

        Set it as `TransformerConfig.finalize_model_grads_func`. Collective.

        Raises:
            ConfigError: in the first step, on every rank: the losses were averaged over another
                number of pairs than the step had, or the copies of the head are not equal.
        """
        finalize_model_grads(model, *args, **kwargs)
        if not self._is_checked:
            self._outputs.check_pairs()
            self._shared_head.check_equal()
            self._is_checked = True
        # After megatron-core's own reductions: the copies' gradients are then complete within
        # their stage, and the tied embedding's already sums the first and the last stage.
        self._shared_head.sum_gradients()
        self._gradient_sum_pending = False

    def take_outputs(self, num_micro_batches: int) -> list[LayerOutput]:
        """Return the outputs of this rank's layers since the last call, and drop them.

        Args:
            num_micro_batches: how many ran; each layer of this rank must have one output per
                micro-batch.

        Raises:
            ConfigError: a layer lacks outputs, because its chunk was not run or not through
                `forward`; or the gradients of a trained head's copies were not summed.
        """
        outputs = self._outputs.take(num_micro_batches)
        if self._gradient_sum_pending:
            raise ConfigError.at(
                "TransformerConfig.finalize_model_grads_func",
                "did not sum the gradients of the head's copies on other stages",
                "set it to AttachedDpo.finalize_model_grads",
            )
        return outputs

    def detach(self) -> None:
        """Restore the chunks and remove their copies of the head. A second call does nothing.

        DDP and optimizers created while attached hold the copies: create new ones to train on.
        """
        while self._undo:
            self._undo.pop()()
        self._shared_head.remove()
        self._chunks = []

    # ---- at a tap -------------------------------------------------------------------------------

    def _on_taps(
        self, head: Head, output: Tensor, hidden: dict[int, Tensor], micro_batch: Any
    ) -> Tensor:
        """Called in the forward pass of a tapped chunk, outside of activation recomputation."""
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
        loss = loss_P.sum() * self._pair_scale(layer, micro_batch)
        # The schedule applies the loss scale (fp16) to the last stage's loss only.
        grad_scale = self._config.grad_scale_func
        return loss if grad_scale is None else grad_scale(loss)

    def _layer_loss(self, layer: int, micro_batch: MicroBatch, logps_2P: Tensor) -> Tensor | None:
        """Each pair's loss at a layer, recorded; None without a reference."""
        reference_layer = layer if self._objective.reference_layer == "same" else self.num_layers
        reference_2P = micro_batch.reference_logps.get(reference_layer)
        loss_P = lengths_2P = None
        if reference_2P is not None or micro_batch.reference_free:
            lengths_2P = micro_batch.targets.lengths()
            loss_P = layer_loss(logps_2P, reference_2P, lengths_2P, self._objective)
        elif torch.is_grad_enabled():
            raise ConfigError.at(
                f"micro-batch {micro_batch.index}",
                f"lacks the reference log-probabilities of layer {reference_layer}",
                "score the data with the reference at every tapped layer and the final one first; "
                "run scoring itself under torch.no_grad",
            )
        self._outputs.record(
            LayerOutput(
                layer,
                micro_batch.index,
                logps_2P.detach(),
                reference_2P,
                None if loss_P is None else loss_P.detach(),
                lengths_2P,
            )
        )
        return loss_P

    def _pair_scale(self, layer: int, micro_batch: MicroBatch) -> float:
        """The weight of a pair's loss at a layer, `scale * D / B`: DDP divides by D again."""
        self._outputs.record_trained(layer, micro_batch)
        self._gradient_sum_pending = self._shared_head.has_trained_copies
        return self._scales[layer] * self._data_size / micro_batch.global_pairs

    def _check_attached(self, model: Any) -> None:
        chunk = model
        while hasattr(chunk, "module"):
            chunk = chunk.module
        if not any(chunk is attached for attached in self._chunks):
            message = f"this {type(chunk).__name__} is not attached, or was detached"
            raise ConfigError.at("AttachedDpo.forward", message, "attach to it")


def _sequence_logps(
    *, hidden_states: Tensor, output_layer: Any, packed_seq_params: Any, **_: Any
) -> Tensor:
    """megatron-core's `output_processor`: call the output layer, whose forward `attach` replaced.

    The call goes through the module, so that DDP's pre-hooks wait for the weight's all-gather.
    """
    logps_2P: Tensor = output_layer(hidden_states, response_targets=packed_seq_params.targets)
    return logps_2P


def _check_micro_batch(micro_batch: object) -> MicroBatch:
    if isinstance(micro_batch, MicroBatch):
        return micro_batch
    raise ConfigError.at(
        "packed_seq_params",
        f"is a {type(micro_batch).__name__}; a tapped chunk needs a MicroBatch",
        "call the model through AttachedDpo.forward",
    )

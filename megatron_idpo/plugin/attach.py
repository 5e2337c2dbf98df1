"""`attach`: intermediate DPO for any Megatron-Core training script.

dpo = attach(chunks, layers=[22], objective=Objective(...), vocab_size=32000)   # before DDP
config.finalize_model_grads_func = dpo.finalize_model_grads

def forward_step(iterator, model):
    tokens, position_ids, batch = next(iterator)          # the same batch on every stage
    output = model(tokens, position_ids, None, **dpo.model_kwargs(batch))
    return output, partial(dpo.loss, batch)

S  positions (s: this rank's shard under sequence parallelism)   B  batch   H  hidden size
P  pairs   Q  sequences
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.build import finalize_model_grads
from megatron_idpo.mcore.model.chunk import (
    ModelChunk,
    RestoreFn,
    enable_embedding_output_grad,
    layers_by_number,
    num_layers,
)
from megatron_idpo.mcore.model.tap import (
    CarriedBatch,
    OnTap,
    ReadFinal,
    evaluate_in_backward,
    install_taps,
)
from megatron_idpo.mcore.parallel.groups import ModelGroups
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.objective.layers import LayerSpec, resolve_layers
from megatron_idpo.plugin.calls import Call, CallChecks
from megatron_idpo.plugin.compatibility import (
    check_all_ranks,
    check_chunks,
    check_expert_bias,
    check_logits,
    check_not_attached,
    check_settings,
    check_vocabulary,
    check_wrappers,
)
from megatron_idpo.plugin.head import Head
from megatron_idpo.plugin.layer_losses import LayerLosses, Returned
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.shared_head import SharedHead


def attach(
    chunks: Sequence[ModelChunk],
    *,
    layers: LayerSpec,
    objective: Objective,
    vocab_size: int,
    use_norm: bool = True,
    pg_collection: Any = None,
) -> "AttachedDpo":
    """Add intermediate DPO to this rank's model chunks. Collective over the model's ranks.

    Args:
        chunks: `GPTModel`s or `HybridModel`s as their owner built them, not yet wrapped in DDP.
            Weights may be loaded later if the checkpoint is distributed: it also fills the copies
            of the head.
        layers: the tapped layers, as `resolve_layers` takes them: layer numbers from 1, depth
            fractions, `{"every": n}`, `"all"`; empty is plain DPO.
        objective: the loss of a layer and the weights of the layers.
        vocab_size: tokens of the vocabulary, without padding rows.
        use_norm: read tapped layers through the final norm.
        pg_collection: megatron-core's `ProcessGroupCollection` of the model; None: the chunks' own.
            The model may be on some ranks of the world only, if `init_process_group` got no
            `device_id`; the others call nothing. Groups with other ranks are created before: torch
            pairs later ones by their number.

    Raises:
        ConfigError: on every rank. Chunks that are wrapped or not language models; layers that do
            not exist or are the final one; groups that are incomplete or cannot be created; and,
            all at once, a second attach, an output layer that changes logits, and settings of
            megatron-core under which the gradient would be silently wrong.
    """
    if problems := check_chunks(chunks):
        raise ConfigError.of(problems)
    if pg_collection is None:
        pg_collection = getattr(chunks[0], "pg_collection", None)
    groups = ModelGroups.of(pg_collection)
    config = chunks[0].config
    taps = resolve_layers(layers, num_layers(chunks[0]))
    problems = [
        *check_not_attached(chunks),
        *check_settings(config),
        *check_logits(chunks),
        *check_expert_bias(chunks),
        *check_vocabulary(chunks, vocab_size),
    ]
    arguments = (taps, objective, vocab_size, use_norm)
    if problems := check_all_ranks(problems, chunks, taps, arguments, groups):
        raise ConfigError.of(problems)
    return AttachedDpo(chunks, taps, objective, vocab_size, groups, use_norm=use_norm)


class AttachedDpo:
    """Intermediate DPO on this rank's chunks, until `detach`. Created by `attach`."""

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        taps: Sequence[int],
        objective: Objective,
        vocab_size: int,
        groups: ModelGroups,
        *,
        use_norm: bool,
    ) -> None:
        """Add heads and taps; `attach` has checked the arguments."""
        self.layers = list(taps)
        """The tapped layers of the whole model, counted from 1."""
        self.num_layers: int = num_layers(chunks[0])
        """The final layer."""
        self.reads_final_reference = bool(taps) and objective.reference_layer == "final"
        """Whether every tapped stage needs the reference's log-probabilities of the final layer."""
        final_scale, scales = objective.layer_scales(len(taps))
        scale_of = {**dict(zip(taps, scales, strict=True)), self.num_layers: final_scale}
        self._config = chunks[0].config
        self._groups = groups
        self._chunks = list(chunks)
        self._vocab_size = vocab_size
        own = [[layer for layer in layers_by_number(c) if layer in self.layers] for c in chunks]
        own_layers = [layer for of_chunk in own for layer in of_chunk]
        own_layers += [self.num_layers for chunk in chunks if chunk.post_process]
        self._losses = LayerLosses(own_layers, scale_of, objective, groups, self._config)
        self._calls = CallChecks(self, groups, self._losses.outputs)
        self._is_checked = False
        self._gradient_sum_pending = False
        self._shared_head = SharedHead(
            chunks, [bool(of_chunk) for of_chunk in own], groups, use_norm=use_norm
        )
        self._undo: list[RestoreFn] = []
        for index, chunk in enumerate(chunks):
            self._add_taps(chunk, self._shared_head.head(index, vocab_size=vocab_size), own[index])

    def _add_taps(self, chunk: ModelChunk, head: Head | None, layers: Sequence[int]) -> None:
        if chunk.pre_process:
            self._undo.append(enable_embedding_output_grad(chunk))
        taps: dict[int, OnTap] = {}
        read_final: ReadFinal | None = None
        if head is not None:
            taps = {layer: partial(self._on_tap, head, layer) for layer in layers}
            read_final = partial(self._read_final, head)
        on_call = partial(self._on_call, chunk)
        self._undo.append(install_taps(chunk, taps, read_final, on_call))

    # ---- called by the training script ----------------------------------------------------------

    @property
    def context(self) -> tuple[int, int]:
        """Index of this context-parallel rank, and their number."""
        return self._groups.context_rank, self._groups.context.size()

    def model_kwargs(self, batch: PreferenceBatch, packed_seq_params: Any = None) -> dict[str, Any]:
        """What a call of the model needs in addition, on every stage.

        A call with it returns, on the last stage, the log-probability of every answer, `[2P]`,
        instead of logits. `labels` have no effect. With `Objective.wpo` and a reference it is
        `[4P]`: followed by log-probabilities at half the temperature, for `loss`'s weights.

        Args:
            batch: of the call.
            packed_seq_params: the caller's own, for Megatron's `thd` format or shared-prompt rows.
        """
        _check_batch(batch)
        if not self._chunks:
            raise ConfigError.at("AttachedDpo.model_kwargs", "was detached", "attach again")
        batch.check_vocabulary(self._vocab_size)
        targets = batch.targets.on_context_rank(*self.context)
        carried = CarriedBatch.of(
            Call(self, batch, targets), packed_seq_params, batch.targets.shape[1]
        )
        return {"packed_seq_params": carried}

    def forward(self, model: Any, batch: PreferenceBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Call one model chunk with `model_kwargs`, and nothing more.

        Args:
            model: a chunk, wrapped or not.
            batch: of the call.
            *args: of the model.
            **kwargs: of the model.

        Returns:
            The chunk's output; on the last stage the log-probability of every answer `[2P]`.

        Raises:
            ConfigError: the chunk is not attached, or `batch` is not a `PreferenceBatch`.
            DataError: tokens of another batch, or targets beyond the vocabulary.
        """
        self._check_attached(model)
        own = kwargs.pop("packed_seq_params", None)
        output: Tensor = model(*args, **kwargs, **self.model_kwargs(batch, own))
        return output

    def loss(self, batch: PreferenceBatch, logps_2P: Tensor) -> Returned:
        """The final layer's term of the loss: megatron-core's `loss_func` on the last stage.

        Args:
            batch: that the model was called with.
            logps_2P: what it returned.

        Returns:
            `(1 - w) * sum(L) * M * D / B` (`layer_losses.py`), and what Megatron's training loop
            logs, `{name: [sum, pairs]}` (`step_log.py`). Without gradients: 0, and the final
            layer's values; nothing without a reference. With `calculate_per_token_loss`:
            `(1 - w) * sum(L)`, the number of pairs, and the log.

        Raises:
            ConfigError: the output is not of this batch, or was changed; in training, a micro-batch
                without the reference's log-probabilities or without counts.
        """
        num_values = 4 if self._losses.weighs_pairs(batch) else 2
        if logps_2P.shape != (num_values * batch.num_pairs,):
            message = f"an output of shape {tuple(logps_2P.shape)} for {batch.num_pairs} pairs"
            remedy = "merge AttachedDpo.model_kwargs(batch) of the same batch into the model's call"
            raise ConfigError.at("AttachedDpo.loss", message, remedy)
        with self._losses.discarding_step_on_error():
            self._calls.check_result(logps_2P, batch)
            returned = self._losses.final_layer(batch, logps_2P)
        if torch.is_grad_enabled():
            self._gradient_sum_pending = self._shared_head.has_trained_copies
        return returned

    def finalize_model_grads(self, model: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """megatron-core's `finalize_model_grads`, then the sum over the copies of a trained head.

        Also fills the log that `loss` returned. Set it as
        `TransformerConfig.finalize_model_grads_func`. Collective.

        Raises:
            ConfigError: a layer was not evaluated once per micro-batch; in the first step, on every
                rank: the model is wrapped in FSDP, the losses were averaged over another number of
                pairs than the step had, or the copies of the head are not equal.
        """
        if not self._is_checked and (problems := check_wrappers(model)):
            raise ConfigError.of(problems)
        finalize_model_grads(model, *args, **kwargs)
        with self._losses.discarding_step_on_error():
            gather = None if self._is_checked else self._groups.gather
            sums_by_layer = self._losses.outputs.finish_step(gather)
            self._calls.forget_results()
            if not self._is_checked:
                self._shared_head.check_equal()
                self._is_checked = True
        # After megatron-core's own reductions: the copies' gradients are then complete within
        # their stage, and the tied embedding's already sums the first and the last stage.
        self._shared_head.sum_gradients()
        self._gradient_sum_pending = False
        self._losses.log.fill(sums_by_layer)

    def discard_step(self) -> None:
        """Forget a step that did not reach `finalize_model_grads`, before the next one begins.

        For scripts that catch an exception in a step and continue.
        """
        self._losses.discard_step()
        self._calls.forget_results()
        self._gradient_sum_pending = False

    def check_next_step(self) -> None:
        """Compare the next step over all ranks, as the first one, which had other pairs."""
        self._is_checked = False

    def report_evaluation(self, *args: Any) -> dict[str, float]:
        """Means of all layers over the pairs that were evaluated since the last training step.

        Megatron-LM's `non_loss_data_func`: its own log of an evaluation has the final layer only.
        Collective over pipeline and data-parallel ranks.

        Args:
            *args: not used.

        Returns:
            By the names of the training log; empty if no pair with a reference was evaluated.
        """
        return self._losses.log.evaluation(self._losses.outputs.take_evaluation())

    @contextmanager
    def collect_outputs(self, num_micro_batches: int | None = None) -> Iterator[list[LayerOutput]]:
        """The outputs of this rank's layers, recorded by the schedule that runs in the block.

        Without it, only sums are kept.

        Args:
            num_micro_batches: how many run; each layer of this rank must have one output each.
                None: layers are compared with each other.

        Raises:
            ConfigError: at the end of the block. A layer lacks outputs, because its chunk was not
                run with `model_kwargs`; or the gradients of a trained head's copies were not
                summed.
        """
        with (
            self._losses.discarding_step_on_error(),
            self._losses.outputs.collect(num_micro_batches) as outputs,
        ):
            yield outputs
        if self._gradient_sum_pending:
            raise ConfigError.at(
                "TransformerConfig.finalize_model_grads_func",
                "did not sum the gradients of the head's copies on other stages",
                "set it to AttachedDpo.finalize_model_grads",
            )

    def detach(self) -> None:
        """Restore the chunks and remove their copies of the head. A second call does nothing.

        DDP and optimizers created while attached hold the copies: create new ones to train on.
        """
        while self._undo:
            self._undo.pop()()
        self._shared_head.remove()
        self._chunks = []

    # ---- within the model's call ----------------------------------------------------------------

    def _on_call(
        self, chunk: ModelChunk, call: Call, packed_seq_params: Any, tokens: Tensor | None
    ) -> None:
        self._calls.begin(chunk, call, packed_seq_params, tokens)
        if torch.is_grad_enabled() and not self._is_checked:
            self._losses.outputs.add_call(id(chunk), call.batch.targets)

    def _on_tap(
        self, head: Head, layer: int, hidden_sBH: Tensor, call: Call, evaluates_now: bool
    ) -> Tensor:
        """Called whenever a tapped layer runs, also for a recomputation."""
        head.enter(evaluates_now=evaluates_now)
        if torch.is_grad_enabled():
            if not hidden_sBH.requires_grad:
                message = "needs no gradient, so its tap would have none: all below it is frozen"
                remedy = "call decoder_input.requires_grad_() before the model's call"
                raise ConfigError.at(f"layer {layer}", message, remedy)
            return evaluate_in_backward(hidden_sBH, partial(self._tapped_loss, head, layer, call))
        # Without gradients it is either an evaluation, or the first run of a checkpoint.
        if evaluates_now:
            logps_2P = self._read(head, hidden_sBH, call, normed=False)
            self._losses.evaluate(layer, call.batch, logps_2P)
        return hidden_sBH

    def _read_final(self, head: Head, hidden_sBH: Tensor, call: Call) -> Tensor:
        # The decoder of the last chunk ends with the final norm.
        logps_2P = self._read(head, hidden_sBH, call, normed=True)
        self._calls.remember(logps_2P, call.batch)
        return logps_2P

    def _read(self, head: Head, hidden_sBH: Tensor, call: Call, *, normed: bool) -> Tensor:
        """The log-probability of each answer `[2P]`; `[4P]` with the sharpened ones of WPO."""
        logps_Q = head.sequence_logps(hidden_sBH, call.targets, normed=normed)
        logps_2P = call.batch.by_answer(logps_Q)
        if not self._losses.weighs_pairs(call.batch):
            return logps_2P
        with torch.no_grad():
            sharpened_Q = head.sequence_logps(hidden_sBH, call.targets, normed=normed, sharpness=2)
        return torch.cat([logps_2P, call.batch.by_answer(sharpened_Q)])

    def _tapped_loss(self, head: Head, layer: int, call: Call, hidden_sBH: Tensor) -> Tensor:
        with self._losses.discarding_step_on_error():
            logps_2P = self._read(head, hidden_sBH, call, normed=False)
            loss = self._losses.tapped_layer(layer, call.batch, logps_2P)
        self._gradient_sum_pending = self._shared_head.has_trained_copies
        # The schedule applies the loss scale (fp16) to the last stage's loss only.
        grad_scale = self._config.grad_scale_func
        return loss if grad_scale is None else grad_scale(loss)

    def _check_attached(self, model: Any) -> None:
        chunk = model
        while hasattr(chunk, "module"):
            chunk = chunk.module
        if not any(chunk is attached for attached in self._chunks):
            message = f"this {type(chunk).__name__} is not attached, or was detached"
            raise ConfigError.at("AttachedDpo.forward", message, "attach to it")


def _check_batch(batch: object) -> None:
    if not isinstance(batch, PreferenceBatch):
        message = f"is a {type(batch).__name__}, not a PreferenceBatch"
        raise ConfigError.at("batch", message, "build one from the micro-batch's targets")

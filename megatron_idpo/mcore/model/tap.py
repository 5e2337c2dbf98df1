"""Taps: read a layer's output in every forward pass and add a loss there in the backward pass.

The batch reaches the layers as `packed_seq_params`, the one argument that megatron-core hands from
the model's call to every layer of every stage and keeps per micro-batch, also for a recomputation
in the backward pass. `CarriedBatch` is such an argument: it holds the batch and the value that the
caller passed. Each layer's `forward` takes it apart again, so that everything below the layer gets
what the caller passed.

A tapped layer returns an identity of its output, `evaluate_in_backward`. Under recomputation a
layer runs twice; the identity that autograd differentiates is the one of the second run, and it is
differentiated once. So nothing has to know whether a run is a recomputation.

The `forward` of chunk, layers and output layer, and the chunk's `_scale_logits`, are replaced on
the instances. No class is patched.

    S  positions (s: this rank's shard under sequence parallelism)   B  batch   H  hidden size
    A  answers that the final layer scores
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.chunk import ModelChunk, RestoreFn, layers_by_number

_ARGUMENT = "packed_seq_params"


@dataclass(kw_only=True, eq=False)
class CarriedBatch(PackedSeqParams):
    """A batch on its way through a chunk, and the caller's own `packed_seq_params`.

    megatron-core reads a few fields of the argument above the layers, for rotary positions. They
    are the caller's, or those that mean an ordinary `[B, S]` batch.
    """

    batch: Any
    original: PackedSeqParams | None = None
    evaluates_now: bool = False
    """Whether there will be no backward pass, so that taps evaluate in the forward pass. Set by the
    chunk's forward: the layers cannot distinguish it from the first run of a
    checkpoint."""

    @classmethod
    def of(cls, batch: Any, original: PackedSeqParams | None, sequence_tokens: int) -> Self:
        """Carry a batch.

        Args:
            batch: for the taps and the output layer.
            original: the caller's own value, or None.
            sequence_tokens: S, over all context-parallel ranks.
        """
        if original is None:
            # `thd` would make attention and rotary embedding expect a packed sequence.
            return cls(
                batch=batch,
                qkv_format="sbhd",
                max_seqlen_q=sequence_tokens,
                max_seqlen_kv=sequence_tokens,
            )
        carried = cls(batch=batch, original=original)
        # Not through the constructor, which would derive `seq_idx` again.
        carried.__dict__.update(vars(original))
        return carried


OnTap = Callable[[Tensor, Any, bool], Tensor]
"""Takes a tapped layer's output `[s, B, H]`, the batch, and whether to evaluate now. Returns the
output, possibly with more in its graph."""

ReadFinal = Callable[[Tensor, Any], Tensor]
"""Takes the normed hidden state `[s, B, H]` of the last stage and the batch; returns `[A]`."""

OnCall = Callable[[Any, PackedSeqParams | None, Tensor | None], None]
"""Takes the batch, the caller's own `packed_seq_params` and the tokens of a call that begins."""


def install_taps(
    chunk: ModelChunk, taps: Mapping[int, OnTap], read_final: ReadFinal | None, on_call: OnCall
) -> RestoreFn:
    """Make a chunk's calls with a `CarriedBatch` run the taps; other calls run as before.

    Args:
        chunk: before it is wrapped in DDP.
        taps: by layer of this chunk, as `layers_by_number` counts them.
        read_final: on the last stage: what to return instead of logits.
        on_call: checks a call before it runs.
    """
    on_tap = {id(layer): taps.get(number) for number, layer in layers_by_number(chunk).items()}
    running: list[CarriedBatch] = []
    undo = [
        _replace_forward(layer, partial(_layer_forward, layer.forward, on_tap.get(id(layer))))
        for layer in chunk.decoder.layers
    ]
    if chunk.post_process:
        assert read_final is not None
        output_forward = partial(_output_forward, chunk.output_layer.forward, read_final, running)
        undo.append(_replace_forward(chunk.output_layer, output_forward))
        scale_logits = partial(_scale_logits, chunk._scale_logits, running)
        undo.append(_replace_method(chunk, "_scale_logits", scale_logits))
    undo.append(_replace_forward(chunk, _ChunkForward(chunk, running, on_call)))

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def is_tapped(chunk: ModelChunk) -> bool:
    """Whether `install_taps` has changed this chunk, on any stage, also one without a tap."""
    return isinstance(vars(chunk).get("forward"), _ChunkForward)


def _replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> RestoreFn:
    return _replace_method(module, "forward", forward)


def _replace_method(module: torch.nn.Module, name: str, method: Callable[..., Any]) -> RestoreFn:
    replaced = vars(module).get(name)
    setattr(module, name, method)

    def restore() -> None:
        delattr(module, name)
        if replaced is not None:
            setattr(module, name, replaced)

    return restore


class _ChunkForward:
    """The forward of a chunk: announces a carried batch to its output layer."""

    def __init__(self, chunk: ModelChunk, running: list[CarriedBatch], on_call: OnCall) -> None:
        self._forward = chunk.forward
        self._chunk = chunk
        self._output_layer = chunk.output_layer if chunk.post_process else None
        parameters = list(signature(chunk.forward).parameters)
        self._labels_at = parameters.index("labels") if "labels" in parameters else None
        self._running = running
        self._on_call = on_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        carried = kwargs.get(_ARGUMENT)
        if not isinstance(carried, CarriedBatch):
            return self._forward(*args, **kwargs)
        tokens = args[0] if args else kwargs.get("input_ids")
        self._on_call(carried.batch, carried.original, tokens)
        if self._output_layer is not None and self._chunk.output_layer is not self._output_layer:
            kind = type(self._chunk.output_layer).__name__
            message = f"was replaced by a {kind} after attach, which taps do not run"
            remedy = "leave the output layer out of the modules to adapt"
            raise ConfigError.at("output_layer", message, remedy)
        carried.evaluates_now = not torch.is_grad_enabled()
        # With labels the model would compute a cross-entropy of what we return instead of logits.
        if kwargs.get("labels") is not None:
            kwargs = {**kwargs, "labels": None}
        if self._labels_at is not None and len(args) > self._labels_at:
            args = (*args[: self._labels_at], None, *args[self._labels_at + 1 :])
        # The output layer gets no `packed_seq_params`. It runs within this call, and only here:
        # megatron-core does not recompute it.
        self._running.append(carried)
        try:
            output = self._forward(*args, **kwargs)
        finally:
            self._running.pop()
        return output if self._output_layer is None else output.reshape(-1)


def _layer_forward(
    forward: Callable[..., Any], on_tap: OnTap | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a layer: unpacks the argument, and calls its tap."""
    carried = kwargs.get(_ARGUMENT)
    if not isinstance(carried, CarriedBatch):
        return forward(*args, **kwargs)
    output = forward(*args, **{**kwargs, _ARGUMENT: carried.original})
    if on_tap is None:
        return output
    # A transformer layer returns (hidden states, context), other layers hidden states.
    if isinstance(output, tuple):
        return (on_tap(output[0], carried.batch, carried.evaluates_now), *output[1:])
    return on_tap(output, carried.batch, carried.evaluates_now)


def _output_forward(
    forward: Callable[..., Any],
    read_final: ReadFinal,
    running: list[CarriedBatch],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of the output layer: log-probabilities `[A, 1, 1]` instead of logits.

    It is still reached through the module's `__call__`, so that DDP's pre-hooks wait for the weight
    if parameters are all-gathered during the forward pass (`overlap_param_gather`).
    """
    if not running:
        return forward(*args, **kwargs)
    hidden_sBH = args[0] if args else kwargs["input_"]
    return read_final(hidden_sBH, running[-1].batch).view(-1, 1, 1), None


def _scale_logits(
    scale: Callable[[Tensor], Tensor], running: list[CarriedBatch], logits: Tensor
) -> Tensor:
    """What megatron-core does with the output layer's result; log-probabilities are complete."""
    return logits if running else scale(logits)


Evaluate = Callable[[Tensor], Tensor]
"""From a tapped hidden state to the loss, a scalar that is already scaled for the schedule."""


class _EvaluatedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, evaluate: Evaluate) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.evaluate = evaluate
        return hidden

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        # A leaf: the backward below stops here instead of running the layers below the tap, which
        # autograd does once, with the sum of both gradients.
        hidden = saved.detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.evaluate(hidden)
        # Parameters of a trainable head accumulate their gradients here, through the same
        # AccumulateGrad nodes (and DDP hooks) as everywhere else.
        torch.autograd.backward(loss)
        return grad_hidden + hidden.grad, None


def evaluate_in_backward(hidden: Tensor, evaluate: Evaluate) -> Tensor:
    """`hidden`, whose backward pass also adds the gradient of `evaluate(hidden)`.

    A pipeline stage that taps a layer has a loss that the schedule does not know about. It is
    evaluated when the gradient from the layers above arrives, and adds its own. So the head runs
    once per tap and micro-batch, and logits of one micro-batch at a time exist. That a stage-local
    loss needs only the pipeline's own messages is a result of EE-LLM (Chen et al. 2023, arXiv
    2312.04916), which also defers the head into the backward pass.

    Args:
        hidden: a tapped layer's output. It must require a gradient, or backward would never run.
        evaluate: runs in the backward pass, with gradients enabled. All ranks of a stage reach it
            at the same point of the schedule, so its collectives match.

    Returns:
        The same values, not as a view: a stage's output is deallocated after it was sent, and
        megatron-core asserts that it is not a view, whose storage would stay.
    """
    assert hidden.requires_grad, "a tap on a tensor that needs no gradient never runs"
    tapped = _EvaluatedInBackward.apply(hidden, evaluate)
    viewless: Tensor = make_viewless_tensor(tapped, requires_grad=True, keep_graph=True)
    return viewless

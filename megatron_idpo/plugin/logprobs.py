"""Token log-probabilities from hidden states and a vocabulary-parallel output weight.

What: `vocab_parallel_logprobs`, the output projection, softmax and look-up of the target in one
autograd function that never holds the logits: tiles of targets and vocabulary are multiplied,
reduced and forgotten. Statistics are float32; ranks exchange three numbers per target, once.

Two ways, by whether the weight learns:

* *Frozen weight* (LoRA): d log p_y / d hidden does not depend on the loss,

      u = (1 − p_y) · (W[y] − Σ_{v≠y} softmax_{v≠y}(z)_v W[v])

  and is computed while a tile's logits exist: 4·N·H·V FLOPs, no recomputation, nothing for the
  weight. Backward multiplies by the incoming gradient. The target is left out of the sum because
  W[y] − Σ_v p_v W[v] cancels where p_y is near 1: in bf16 it is off by percents there.
* *Trainable weight*: backward computes the logits again: 8·N·H·V FLOPs. The weight's gradient is
  accumulated in float32, a tile of rows at a time.

What it does not do: gather a sequence-parallel hidden state (the caller's all-gather, whose
backward reduce-scatters the partial gradients; say `reduce_hidden_grad=False`), differentiate
twice, or return logits.

    N  targets   V  this rank's rows of the vocabulary   H  hidden size   n, v  of a tile
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idpo.plugin.projection import Projection, read_shard
from megatron_idpo.plugin.tiles import (
    TileSizes,
    accumulate,
    accumulation_dtype,
    as_operand,
    native_bf16,
    slices,
)
from megatron_idpo.plugin.vocab_softmax import (
    LogitTransform,
    Statistics,
    TokenSoftmax,
    combine,
    locate,
)


def vocab_parallel_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
    frozen: bool | None = None,
    main_grad_VH: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    tiles: TileSizes | None = None,
) -> Tensor:
    """log softmax(f(hidden @ weight.T))[target] over the whole vocabulary, for every target.

    Collectives over `group` (none if it is None or has one rank), for any `N`, 0 too: forward, one
    all-gather of three numbers per target; backward, one all-reduce of the hidden gradient, or none
    with `reduce_hidden_grad=False`.

    Args:
        hidden_NH: bf16, fp16, fp32 or fp64, the same on every rank of `group`.
        weight_VH: this rank's rows, of the same dtype.
        targets_N: int64, tokens of the whole vocabulary, in `[0, vocab_valid)`. A target that no
            rank owns gets −inf.
        vocab_start: the token that this rank's first row is.
        vocab_valid: tokens of the whole vocabulary. Rows beyond are padding: they take no part and
            get no gradient. None: no rank has padding.
        group: the ranks that share the vocabulary.
        logit_scale: the family's factor on logits. None: 1.
        softcap: the family's cap, `softcap · tanh(logit_scale · x / softcap)`. None: none.
        frozen: take the frozen weight's way; the weight gets no gradient even if it asks for one.
            None: exactly if the weight does not require a gradient.
        main_grad_VH: where to add a trainable weight's gradient during backward, of any floating
            dtype. Autograd then gets None for the weight, so whoever passes Megatron's `main_grad`
            also has to tell its DDP that the parameter is ready.
        reduce_hidden_grad: False leaves the hidden gradient as this rank's part of the sum over
            `group`, for a sequence-parallel gather whose backward adds the parts up.
        tiles: None: `TileSizes.default`.

    Returns:
        Log-probabilities, `[N]`, at most 0; float32 (float64 for float64 inputs).
    """
    assert hidden_NH.ndim == 2 and targets_N.shape == hidden_NH.shape[:1], "[N, H] and [N]"
    assert weight_VH.ndim == 2 and weight_VH.shape[1] == hidden_NH.shape[1], "[V, H]"
    assert weight_VH.dtype == hidden_NH.dtype, f"{weight_VH.dtype} and {hidden_NH.dtype}"
    if frozen is None:
        frozen = not weight_VH.requires_grad
    if frozen:
        weight_VH = weight_VH.detach()
    rows = weight_VH.shape[0]
    projection = Projection(
        start=vocab_start,
        num_rows=rows if vocab_valid is None else min(max(vocab_valid - vocab_start, 0), rows),
        transform=LogitTransform(1.0 if logit_scale is None else logit_scale, softcap),
        tiles=tiles or TileSizes.default(hidden_NH.device, frozen=frozen),
        group=group,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    if not (torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)):
        statistics = read_shard(hidden_NH.detach(), weight_VH.detach(), targets_N, projection)
        return combine(statistics, group).logps()
    if frozen:
        logps_N = _FrozenHead.apply(hidden_NH, weight_VH, targets_N, projection)
    else:
        logps_N = _TrainableHead.apply(hidden_NH, weight_VH, targets_N, projection, main_grad_VH)
    assert isinstance(logps_N, Tensor)
    return logps_N


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and, in the same pass, their gradient with respect to hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, projection: Projection
    ) -> Tensor:
        """Keeps this rank's part of `u`, unrounded: the gradient is rounded once."""
        direction_NH = hidden_NH.new_zeros(hidden_NH.shape, dtype=accumulation_dtype(hidden_NH))
        statistics = read_shard(hidden_NH, weight_VH, targets_N, projection, direction_NH)
        softmax = combine(statistics, projection.group)
        _finish(direction_NH, statistics, softmax, weight_VH, targets_N, projection)
        ctx.save_for_backward(direction_NH)
        ctx.projection, ctx.dtype = projection, hidden_NH.dtype
        return softmax.logps()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """`grad · u`, summed over ranks."""
        (direction_NH,) = ctx.saved_tensors
        grad_NH = torch.empty_like(direction_NH, dtype=ctx.dtype)
        for tokens in slices(grad_N.shape[0], ctx.projection.tiles.tokens):
            grad_NH[tokens] = direction_NH[tokens] * grad_N[tokens, None]
        return ctx.projection.sum_over_ranks(grad_NH), None, None, None


def _finish(
    sum_NH: Tensor,
    statistics: Statistics,
    softmax: TokenSoftmax,
    weight_VH: Tensor,
    targets_N: Tensor,
    projection: Projection,
) -> None:
    """Turn `read_shard`'s sum into this rank's part of `u`, in place: the softmax is known now.

    The rank that owns the target adds W[y] in the accumulation dtype, never through a product.
    """
    # What exp(z_v − this rank's maximum) lacks to be the softmax over the others.
    share_N = (statistics.maximum_N - softmax.maximum_N).exp() / softmax.sum_N
    miss_N = softmax.miss() * projection.transform.scale
    slope_N = projection.transform.slope(softmax.target_N)
    inside_N, index_N1 = locate(targets_N - projection.start, projection.num_rows)
    own_N = inside_N.to(sum_NH.dtype) if slope_N is None else inside_N * slope_N
    for tokens in slices(targets_N.shape[0], projection.tiles.tokens):
        target_nH = weight_VH.index_select(0, index_N1[tokens, 0]).to(sum_NH.dtype)
        sum_nH = sum_NH[tokens].mul_(-share_N[tokens, None])
        sum_nH.addcmul_(target_nH, own_N[tokens, None]).mul_(miss_N[tokens, None])


class _TrainableHead(torch.autograd.Function):
    """Log-probabilities whose backward computes the logits again, a tile at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        projection: Projection,
        main_grad_VH: Tensor | None,
    ) -> Tensor:
        """Keeps the inputs and three numbers per target."""
        softmax = combine(read_shard(hidden_NH, weight_VH, targets_N, projection), projection.group)
        statistics = (softmax.maximum_N, softmax.sum_N, softmax.target_N)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, *statistics)
        # Not a saved tensor: other micro-batches write to it between this forward and backward.
        ctx.main_grad_VH = main_grad_VH
        ctx.projection = projection
        return softmax.logps()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, summed over ranks, and of this rank's rows."""
        hidden_NH, weight_VH, targets_N, *statistics = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype, projection = accumulation_dtype(hidden_NH), ctx.projection
        softmax, buffer = TokenSoftmax(*statistics), projection.buffer(hidden_NH)
        grad_NH = torch.zeros_like(hidden_NH, dtype=dtype) if wants_hidden else None
        into_VH = None
        if wants_weight:
            into_VH = torch.zeros_like(weight_VH) if ctx.main_grad_VH is None else ctx.main_grad_VH
        with native_bf16(hidden_NH):
            for rows, weight_vH in projection.vocab_tiles(weight_VH):
                sum_vH = None if into_VH is None else _accumulator(into_VH[rows], dtype)
                for tokens, hidden_nH, column_n in projection.token_tiles(
                    hidden_NH, targets_N, rows
                ):
                    logits_nv = buffer.product(hidden_nH, weight_vH)
                    softmax.to_logit_gradient(
                        tokens, logits_nv, column_n, grad_N[tokens], projection.transform
                    )
                    gradient_nv = as_operand(logits_nv, weight_VH.dtype)
                    if grad_NH is not None:
                        accumulate(grad_NH[tokens], gradient_nv, weight_vH)
                    if sum_vH is not None:
                        accumulate(sum_vH, gradient_nv.t(), hidden_nH)
                if into_VH is not None and sum_vH is not None and into_VH.dtype != dtype:
                    into_VH[rows].add_(sum_vH)
        if grad_NH is not None:
            grad_NH = projection.sum_over_ranks(grad_NH.to(hidden_NH.dtype))
        return grad_NH, into_VH if ctx.main_grad_VH is None else None, None, None, None


def _accumulator(into_vH: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a tile of the weight's gradient is summed: in place, or beside what is narrower."""
    return into_vH if into_vH.dtype == dtype else torch.zeros_like(into_vH, dtype=dtype)

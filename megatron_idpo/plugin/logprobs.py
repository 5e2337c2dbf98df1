"""Token log-probabilities from hidden states and a vocabulary-parallel output weight.

`vocab_parallel_logprobs` fuses the output projection, the softmax and the target look-up in one
autograd function that never holds the logits `[N, V]`: tiles of targets x vocabulary rows are
multiplied, reduced to statistics and discarded.

1. Scan (`scan_shard`): each rank multiplies its own vocabulary rows and keeps three float32 values
   per target: the largest logit of the other tokens, their sum of exponentials, the target's logit.
2. Combine (`combine_ranks`): one all-gather of these values, once for all tiles.
3. Gradient, in one of two ways:

* *Frozen weight* (LoRA): d log p_y / d hidden does not depend on the loss,

      u = (1 − p_y) · (W[y] − Σ_{v≠y} softmax_{v≠y}(z)_v W[v])

  and is computed in the forward pass while a tile's logits exist: 4·N·H·V FLOPs, no recomputation,
  no weight gradient. Backward multiplies by the incoming gradient. The target is left out of the
  sum because W[y] − Σ_v p_v W[v] cancels where p_y is near 1: in bf16 it is off by percents there.
  A map of the logits (`LogitMap`) multiplies each row of W by its derivative there.
* *Trainable weight*: backward recomputes the logits: 8·N·H·V FLOPs. The weight's gradient is
  accumulated in float32, a tile of rows at a time.

Dtypes: operands keep the model's dtype, products and statistics are float32 (`tiles.py`), each
gradient is rounded to the model's dtype once, before it is summed over ranks.

Not included: gathering a sequence-parallel hidden state (the caller all-gathers, its backward
reduce-scatters the partial gradients; pass `reduce_hidden_grad=False`), double backward, logits.

    N  targets   V  this rank's vocabulary rows   H  hidden size   n, v  sizes of one tile
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idpo.mcore.matmul import (
    accumulation_dtype,
    add_matmul,
    matmul_operand,
    onednn_bf16_matmul,
    slices,
)
from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.plugin.tiles import Projection, TileSizes, scan_shard, tile_logits
from megatron_idpo.plugin.vocab_softmax import (
    PartialSoftmax,
    TokenSoftmax,
    combine_ranks,
    locate_columns,
)

_PLAIN = LogitMap()


def vocab_parallel_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    logit_map: LogitMap = _PLAIN,
    group: dist.ProcessGroup | None = None,
    frozen: bool | None = None,
    reduce_hidden_grad: bool = True,
    tiles: TileSizes | None = None,
) -> Tensor:
    """log softmax(map(hidden @ weight.T))[target] over the whole vocabulary, for every target.

    Collectives over `group` (none if it is None or has one rank), also for `N = 0`: forward, one
    all-gather of three values per target; backward, one all-reduce of the hidden gradient, or none
    with `reduce_hidden_grad=False`.

    Args:
        hidden_NH: bf16, fp16, fp32 or fp64, the same on every rank of `group`.
        weight_VH: this rank's rows, of the same dtype.
        targets_N: int64, tokens of the whole vocabulary, in `[0, vocab_valid)`. A target that no
            rank owns gets −inf.
        vocab_start: token id of this rank's first row.
        vocab_valid: tokens of the whole vocabulary. Rows beyond it are padding: they do not enter
            the softmax and get no gradient. None: no rank has padding.
        logit_map: from the product to the logits: a factor, a soft cap.
        group: the ranks that share the vocabulary.
        frozen: use the frozen-weight path; the weight gets no gradient even if it requires one.
            None: frozen exactly if the weight does not require a gradient.
        reduce_hidden_grad: False leaves the hidden gradient as this rank's term of the sum over
            `group`, for a sequence-parallel gather whose backward sums the terms.
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
        tiles=tiles or TileSizes.default(hidden_NH.device, frozen=frozen),
        logit_map=logit_map,
        group=group,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    if not (torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)):
        partial = scan_shard(hidden_NH.detach(), weight_VH.detach(), targets_N, projection)
        return combine_ranks(partial, group).logps()
    head = _FrozenHead if frozen else _TrainableHead
    logps_N = head.apply(hidden_NH, weight_VH, targets_N, projection)
    assert isinstance(logps_N, Tensor)
    return logps_N


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and, in the same pass, their gradient with respect to hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, projection: Projection
    ) -> Tensor:
        """Save this rank's term of `u` in the accumulation dtype, so that it is rounded once."""
        u_NH = hidden_NH.new_zeros(hidden_NH.shape, dtype=accumulation_dtype(hidden_NH))
        partial = scan_shard(hidden_NH, weight_VH, targets_N, projection, u_NH)
        softmax = combine_ranks(partial, projection.group)
        _finish_hidden_gradient(u_NH, partial, softmax, weight_VH, targets_N, projection)
        ctx.save_for_backward(u_NH)
        ctx.projection, ctx.dtype = projection, hidden_NH.dtype
        return softmax.logps()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """`grad · u`, summed over ranks by one all-reduce."""
        (u_NH,) = ctx.saved_tensors
        grad_NH = torch.empty_like(u_NH, dtype=ctx.dtype)
        # In tiles: the float32 product of a whole micro-batch would be a second u_NH in memory.
        for tokens in slices(grad_N.shape[0], ctx.projection.tiles.tokens):
            grad_NH[tokens] = u_NH[tokens] * grad_N[tokens, None]
        return ctx.projection.sum_over_ranks(grad_NH), None, None, None


def _finish_hidden_gradient(
    sum_NH: Tensor,
    partial: PartialSoftmax,
    softmax: TokenSoftmax,
    weight_VH: Tensor,
    targets_N: Tensor,
    projection: Projection,
) -> None:
    """Turn the sum of `scan_shard` into this rank's term of `u`, in place.

    The sum was accumulated before the softmax over all ranks was known: relative to this rank's
    maximum and not yet normalized.
    """
    # exp(z_v − local maximum) · share = softmax over the others of all ranks.
    share_N = (partial.maximum_N - softmax.maximum_N).exp() / softmax.sum_N
    one_minus_p_N = softmax.one_minus_p()
    inside_N, index_N1 = locate_columns(targets_N - projection.start, projection.num_rows)
    # 1 on the rank that owns the target, 0 elsewhere: W[y] is added exactly once.
    own_N = inside_N.to(sum_NH.dtype)
    for tokens in slices(targets_N.shape[0], projection.tiles.tokens):
        # W[y] is added in the accumulation dtype, not through a product with 16-bit operands.
        target_nH = weight_VH.index_select(0, index_N1[tokens, 0]).to(sum_NH.dtype)
        sum_nH = sum_NH[tokens].mul_(-share_N[tokens, None])
        # The derivative of a map without a cap is the same for all rows of W: it comes last.
        slope_n: Tensor | float = projection.logit_map.slope(softmax.target_N[tokens])
        if isinstance(slope_n, Tensor):
            sum_nH.addcmul_(target_nH, (own_N[tokens] * slope_n)[:, None])
            sum_nH.mul_(one_minus_p_N[tokens, None])
        else:
            sum_nH.addcmul_(target_nH, own_N[tokens, None])
            sum_nH.mul_(slope_n * one_minus_p_N[tokens, None])


class _TrainableHead(torch.autograd.Function):
    """Log-probabilities whose backward recomputes the logits, a tile at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, projection: Projection
    ) -> Tensor:
        """Save the inputs and three values per target."""
        partial = scan_shard(hidden_NH, weight_VH, targets_N, projection)
        softmax = combine_ranks(partial, projection.group)
        statistics = (softmax.maximum_N, softmax.sum_N, softmax.target_N)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, *statistics)
        ctx.projection = projection
        return softmax.logps()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, summed over ranks, and of this rank's rows."""
        hidden_NH, weight_VH, targets_N, *statistics = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, projection = accumulation_dtype(hidden_NH), ctx.projection
        softmax, buffer = TokenSoftmax(*statistics), projection.buffer(hidden_NH)
        grad_NH = torch.zeros_like(hidden_NH, dtype=dtype) if needs_hidden else None
        grad_VH = torch.zeros_like(weight_VH) if needs_weight else None
        with onednn_bf16_matmul(hidden_NH):
            # Vocabulary in the outer loop: each row's gradient is complete after the inner loop,
            # so one float32 tile [v, H] suffices instead of a float32 copy of the whole gradient.
            for rows, weight_vH in projection.vocab_tiles(weight_VH):
                sum_vH = None if grad_VH is None else _accumulator(grad_VH[rows], dtype)
                for tokens, hidden_nH, column_n in projection.token_tiles(
                    hidden_NH, targets_N, rows
                ):
                    logits_nv = tile_logits(hidden_nH, weight_vH, buffer, projection.logit_map)
                    slope_nv = projection.logit_map.slope(logits_nv)
                    softmax.to_logit_gradient(tokens, logits_nv, column_n, grad_N[tokens])
                    if isinstance(slope_nv, Tensor) or slope_nv != 1.0:
                        logits_nv.mul_(slope_nv)
                    grad_nv = matmul_operand(logits_nv, weight_VH.dtype)
                    if grad_NH is not None:
                        add_matmul(grad_NH[tokens], grad_nv, weight_vH)
                    if sum_vH is not None:
                        add_matmul(sum_vH, grad_nv.t(), hidden_nH)
                if grad_VH is not None and sum_vH is not None and grad_VH.dtype != dtype:
                    grad_VH[rows].add_(sum_vH)
        if grad_NH is not None:
            # Rounded before the all-reduce: half the traffic, one more rounding per rank.
            grad_NH = projection.sum_over_ranks(grad_NH.to(hidden_NH.dtype))
        # The rows' gradient needs no collective: every rank has all targets for its own rows.
        return grad_NH, grad_VH, None, None


def _accumulator(grad_vH: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a tile of the weight's gradient is summed: `grad_vH` itself unless it is narrower."""
    return grad_vH if grad_vH.dtype == dtype else torch.zeros_like(grad_vH, dtype=dtype)

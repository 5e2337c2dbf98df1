"""Softmax over a vocabulary that is computed a tile at a time and sharded over ranks.

The target y is kept apart from the *other* tokens v ≠ y. With `m` the largest logit of the others,
`S = Σ_{v≠y} exp(z_v − m)` and `d = (m − z_y) + log S`,

    log p_y = −log(1 + exp(d))        1 − p_y = σ(d)        p_v = (1 − p_y) exp(z_v − m) / S

None of these cancels, however confident the model is: computing 1 − p_y as a difference would lose
the digits of the gradient where p_y is near 1.

    n  targets in a tile   v  vocabulary rows in a tile   N  targets   R  ranks that share the
    vocabulary; all statistics are float32 (float64 for float64 logits)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

_EMPTY_MAXIMUM = -1e30
"""The maximum of no logits. Finite, so that `exp(-inf - maximum)` is 0 and not NaN."""


@dataclass(slots=True)
class PartialSoftmax:
    """Softmax statistics of this rank's vocabulary rows seen so far; each tensor `[N]`."""

    maximum_N: Tensor
    """The largest logit of the others."""

    sum_N: Tensor
    """Σ exp(z_v − maximum) over the others."""

    target_N: Tensor
    """The target's logit, −inf until its tile is seen."""

    @classmethod
    def empty(cls, num_tokens: int, dtype: torch.dtype, device: torch.device) -> "PartialSoftmax":
        """Statistics before the first tile."""
        maximum, total, target = (
            torch.full((num_tokens,), value, dtype=dtype, device=device)
            for value in (_EMPTY_MAXIMUM, 0.0, -torch.inf)
        )
        return cls(maximum, total, target)

    def update(self, tokens: slice, logits_nv: Tensor, column_n: Tensor) -> Tensor:
        """Add one tile of logits for the targets `tokens`.

        Args:
            tokens: the targets of the tile's rows.
            logits_nv: z_v. On return exp(z_v − maximum), 0 at the target.
            column_n: int64, the target's column in this tile; out of range where it is elsewhere.

        Returns:
            `[n]`: the factor for sums over earlier tiles, which are relative to the old maximum.
        """
        before = (self.maximum_N[tokens], self.sum_N[tokens], self.target_N[tokens])
        rescale_n: Tensor = _for_device(_update, logits_nv)(logits_nv, column_n, *before)
        return rescale_n


@dataclass(frozen=True, slots=True)
class TokenSoftmax:
    """The softmax of `N` targets over the whole vocabulary, identical on every rank."""

    maximum_N: Tensor
    """The largest logit of the others; a finite value for a vocabulary of one."""

    sum_N: Tensor
    """Σ exp(z_v − maximum) over the others, > 0."""

    target_N: Tensor
    """z_y; −inf where no rank owns the target."""

    def logps(self) -> Tensor:
        """log p_y, `[N]`."""
        return logsigmoid(-self._log_odds())

    def one_minus_p(self) -> Tensor:
        """1 − p_y, `[N]`, to full precision."""
        return torch.sigmoid(self._log_odds())

    def _log_odds(self) -> Tensor:
        """d: the log-odds of the others against the target."""
        return (self.maximum_N - self.target_N) + self.sum_N.log()

    def to_logit_gradient(
        self, tokens: slice, logits_nv: Tensor, column_n: Tensor, grad_n: Tensor
    ) -> None:
        """Replace a tile of logits by the gradient of the loss with respect to them, in place.

        Args:
            tokens: the targets of the tile's rows.
            logits_nv: z_v; becomes `grad_n · (1[v = y] − p_v)`.
            column_n: int64, the target's column in this tile; out of range where it is elsewhere.
            grad_n: gradient of the loss with respect to the log-probabilities.
        """
        tile = TokenSoftmax(self.maximum_N[tokens], self.sum_N[tokens], self.target_N[tokens])
        target_grad_n = grad_n * tile.one_minus_p()
        _for_device(_to_logit_gradient, logits_nv)(
            logits_nv, column_n, tile.maximum_N, target_grad_n, tile.sum_N
        )


def combine_ranks(partial: PartialSoftmax, group: dist.ProcessGroup | None) -> TokenSoftmax:
    """Merge the statistics of the ranks that share the vocabulary.

    Forward: one all-gather of `[3, N]` over `group`, after the last tile: combining per tile would
    cost a latency-bound collective for each of them and give the same result. No backward: the
    calling autograd function computes the ranks' gradients from what this returns.
    """
    maximum_N, sum_N, target_N = partial.maximum_N, partial.sum_N, partial.target_N
    if group is not None and group.size() > 1:
        local_3N = torch.stack((maximum_N, sum_N, target_N))
        gathered_R3N = local_3N.new_empty(group.size(), *local_3N.shape)
        dist.all_gather_into_tensor(gathered_R3N.view(-1), local_3N.view(-1), group=group)
        maximum_RN, sum_RN, target_RN = gathered_R3N.unbind(1)
        # One rank has the target's logit, the others −inf: the maximum picks it. Every rank sums
        # the same gathered values in the same order, so the results are bitwise equal.
        maximum_N, target_N = maximum_RN.amax(0), target_RN.amax(0)
        sum_N = (sum_RN * (maximum_RN - maximum_N).exp()).sum(0)
    # A vocabulary of one token has no others: S = 0 would make log S −inf and p_v 0/0.
    return TokenSoftmax(maximum_N, sum_N.clamp(min=torch.finfo(sum_N.dtype).tiny), target_N)


def locate_columns(column_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which columns lie in `[0, width)`, bool `[n]`, and an in-range index `[n, 1]` for each.

    Reading and writing one element of every row, target or not, avoids building a list of the
    affected rows, which would synchronize with the GPU.
    """
    inside_n = (column_n >= 0) & (column_n < width)
    return inside_n, column_n.clamp(max=width - 1).clamp(min=0)[:, None]


def _update(
    logits_nv: Tensor, column_n: Tensor, maximum_n: Tensor, sum_n: Tensor, target_n: Tensor
) -> Tensor:
    """Maximum, sum and target after this tile, in place; returns the factor for earlier sums."""
    # Take the target's logit out: −inf there becomes exp(−inf) = 0 below, in the sum over the
    # others as well as in the product with the weights. Rows without the target get their own
    # value written back.
    inside_n, index_n1 = locate_columns(column_n, logits_nv.shape[1])
    value_n1 = logits_nv.gather(1, index_n1)
    logits_nv.scatter_(1, index_n1, value_n1.masked_fill(inside_n[:, None], -torch.inf))
    target_n.copy_(torch.where(inside_n, value_n1[:, 0], target_n))
    new_maximum_n = torch.maximum(maximum_n, logits_nv.amax(1))
    logits_nv.sub_(new_maximum_n[:, None]).exp_()
    rescale_n = (maximum_n - new_maximum_n).exp()
    sum_n.copy_(sum_n * rescale_n + logits_nv.sum(1))
    maximum_n.copy_(new_maximum_n)
    return rescale_n


def _to_logit_gradient(
    logits_nv: Tensor, column_n: Tensor, maximum_n: Tensor, target_grad_n: Tensor, sum_n: Tensor
) -> None:
    """See `TokenSoftmax.to_logit_gradient`; `target_grad_n` is grad · (1 − p_y)."""
    # −grad · p_v for the others, with p_v = (1 − p_y) exp(z_v − m) / S.
    logits_nv.sub_(maximum_n[:, None]).exp_().mul_(-(target_grad_n / sum_n)[:, None])
    # +grad · (1 − p_y) at the target, which exp(z_y − m) above may have overflowed: overwrite it.
    inside_n, index_n1 = locate_columns(column_n, logits_nv.shape[1])
    new_n = torch.where(inside_n, target_grad_n, logits_nv.gather(1, index_n1)[:, 0])
    logits_nv.scatter_(1, index_n1, new_n[:, None])


def _for_device(function: Callable[..., Any], logits_nv: Tensor) -> Callable[..., Any]:
    """`function`, compiled for logits on a GPU: one or two kernels instead of ten."""
    return _compiled(function) if logits_nv.is_cuda else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on first use; shapes are dynamic because the last tiles are smaller."""
    return torch.compile(function, dynamic=True)

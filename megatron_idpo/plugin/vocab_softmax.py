"""The softmax over a vocabulary that is seen a tile at a time and spread over ranks.

The target is kept apart from the *others*. With `m` the greatest of their logits, `S` their sum
Σ_{v≠y} exp(z_v − m) and `d = (m − z_y) + log S`,

    log p_y = −log(1 + exp(d))        1 − p_y = σ(d)        p_v = (1 − p_y) exp(z_v − m) / S

none of which cancels, however sure the model is of its token: taking `p_y` from 1 would have lost
the digits of what is left.

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

_FLOOR = -1e30
"""The maximum over nothing. Finite, so that `exp(-inf - maximum)` is 0 and not NaN."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a family does to its logits: `softcap · tanh(scale · x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None
    """None: no cap."""

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.softcap is None:
            return logits.mul_(self.scale) if self.scale != 1.0 else logits
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative at transformed logits, without `scale`; None where that is 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2


@dataclass(slots=True)
class Statistics:
    """What this rank knows of its targets' softmax after some tiles; each `[N]`."""

    maximum_N: Tensor
    """The greatest logit of the others."""

    sum_N: Tensor
    """Σ exp(z_v − maximum) over the others."""

    target_N: Tensor
    """The target's logit, −inf where it has not been seen."""

    @classmethod
    def start(cls, num_tokens: int, dtype: torch.dtype, device: torch.device) -> "Statistics":
        """Before any tile."""
        maximum, total, target = (
            torch.full((num_tokens,), value, dtype=dtype, device=device)
            for value in (_FLOOR, 0.0, -torch.inf)
        )
        return cls(maximum, total, target)

    def fold(
        self, tokens: slice, logits_nv: Tensor, column_n: Tensor, transform: LogitTransform
    ) -> Tensor:
        """Take in one tile for the targets `tokens`.

        Args:
            tokens: which targets the tile's rows are.
            logits_nv: before `transform`. On return exp(z_v − maximum) · slope, 0 at the target.
            column_n: int64, the target's column in this tile; outside it where it lies elsewhere.
            transform: the family's.

        Returns:
            `[n]`: by what factor a sum over earlier tiles, relative to the earlier maximum, has to
            be multiplied now.
        """
        before = (self.maximum_N[tokens], self.sum_N[tokens], self.target_N[tokens])
        fold = _for_device(_fold, logits_nv)
        after = fold(logits_nv, column_n, *before, transform.scale, transform.softcap)
        for old_n, new_n in zip(before, after[:3], strict=True):
            old_n.copy_(new_n)
        rescale_n: Tensor = after[3]
        return rescale_n


@dataclass(frozen=True, slots=True)
class TokenSoftmax:
    """The softmax of `N` targets over the whole vocabulary, the same on every rank."""

    maximum_N: Tensor
    """The greatest logit of the others; a finite number if there is none."""

    sum_N: Tensor
    """Σ exp(z_v − maximum) over the others, > 0."""

    target_N: Tensor
    """z_y; −inf where no rank owns the target."""

    def logps(self) -> Tensor:
        """log p_y, `[N]`."""
        return logsigmoid(-self._log_odds())

    def miss(self) -> Tensor:
        """1 − p_y, `[N]`, with all its digits."""
        return torch.sigmoid(self._log_odds())

    def _log_odds(self) -> Tensor:
        """d, the others' odds against the target."""
        return (self.maximum_N - self.target_N) + self.sum_N.log()

    def to_logit_gradient(
        self,
        tokens: slice,
        logits_nv: Tensor,
        column_n: Tensor,
        grad_n: Tensor,
        transform: LogitTransform,
    ) -> None:
        """Replace a tile of logits, before `transform`, by the loss's gradient there, in place.

        Args:
            tokens: which targets the tile's rows are.
            logits_nv: becomes `grad_n · (1[v = y] − p_v)` times the derivative of `transform`.
            column_n: int64, the target's column in this tile; outside it where it lies elsewhere.
            grad_n: the loss's gradient with respect to the log-probabilities.
            transform: the family's.
        """
        part = TokenSoftmax(self.maximum_N[tokens], self.sum_N[tokens], self.target_N[tokens])
        _for_device(_to_logit_gradient, logits_nv)(
            logits_nv,
            column_n,
            part.maximum_N,
            grad_n * part.miss() * transform.scale,
            part.sum_N,
            transform.scale,
            transform.softcap,
        )


def combine(statistics: Statistics, group: dist.ProcessGroup | None) -> TokenSoftmax:
    """The ranks' statistics made one.

    One collective for all targets: an all-gather of `[3, N]` over `group`. It has no backward: the
    autograd function that calls it computes the ranks' gradients from what it returns.
    """
    maximum_N, sum_N, target_N = statistics.maximum_N, statistics.sum_N, statistics.target_N
    if group is not None and group.size() > 1:
        local_3N = torch.stack((maximum_N, sum_N, target_N))
        gathered_R3N = local_3N.new_empty(group.size(), *local_3N.shape)
        dist.all_gather_into_tensor(gathered_R3N.view(-1), local_3N.view(-1), group=group)
        maximum_RN, sum_RN, target_RN = gathered_R3N.unbind(1)
        maximum_N, target_N = maximum_RN.amax(0), target_RN.amax(0)
        sum_N = (sum_RN * (maximum_RN - maximum_N).exp()).sum(0)
    return TokenSoftmax(maximum_N, sum_N.clamp(min=torch.finfo(sum_N.dtype).tiny), target_N)


def locate(column_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which columns lie in `[0, width)`, bool `[n]`, and an index `[n, 1]` that always may be read.

    Reading and writing one element of every row, whether or not it is the target, needs no list of
    the rows concerned and so no synchronisation with a GPU.
    """
    inside_n = (column_n >= 0) & (column_n < width)
    return inside_n, column_n.clamp(max=width - 1).clamp(min=0)[:, None]


def _fold(
    logits_nv: Tensor,
    column_n: Tensor,
    maximum_n: Tensor,
    sum_n: Tensor,
    target_n: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum, sum and target after this tile, and the factor for earlier sums."""
    transform = LogitTransform(scale, softcap)
    transform.apply_(logits_nv)
    slope_nv = transform.slope(logits_nv)
    inside_n, index_n1 = locate(column_n, logits_nv.shape[1])
    found_n1 = logits_nv.gather(1, index_n1)
    logits_nv.scatter_(1, index_n1, found_n1.masked_fill(inside_n[:, None], -torch.inf))
    target_n = torch.where(inside_n, found_n1[:, 0], target_n)
    new_maximum_n = torch.maximum(maximum_n, logits_nv.amax(1))
    logits_nv.sub_(new_maximum_n[:, None]).exp_()
    rescale_n = (maximum_n - new_maximum_n).exp()
    new_sum_n = sum_n * rescale_n + logits_nv.sum(1)
    if slope_nv is not None:
        logits_nv.mul_(slope_nv)
    return new_maximum_n, new_sum_n, target_n, rescale_n


def _to_logit_gradient(
    logits_nv: Tensor,
    column_n: Tensor,
    maximum_n: Tensor,
    at_target_n: Tensor,
    sum_n: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """See `TokenSoftmax.to_logit_gradient`; `at_target_n` is the gradient there, without slope."""
    transform = LogitTransform(scale, softcap)
    transform.apply_(logits_nv)
    slope_nv = transform.slope(logits_nv)
    logits_nv.sub_(maximum_n[:, None]).exp_().mul_(-(at_target_n / sum_n)[:, None])
    inside_n, index_n1 = locate(column_n, logits_nv.shape[1])
    new_n = torch.where(inside_n, at_target_n, logits_nv.gather(1, index_n1)[:, 0])
    logits_nv.scatter_(1, index_n1, new_n[:, None])
    if slope_nv is not None:
        logits_nv.mul_(slope_nv)


def _for_device(function: Callable[..., Any], logits_nv: Tensor) -> Callable[..., Any]:
    """`function`, compiled where the logits are on a GPU: one or two kernels instead of ten."""
    return _compiled(function) if logits_nv.is_cuda else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing is compiled before the first call; shapes are dynamic, the last tiles vary."""
    return torch.compile(function, dynamic=True)

"""Row attention with a soft cap on the scores, on a CPU: `c tanh(score / c)` before the softmax.

`scaled_dot_product_attention` has no such cap. Here scores of a block of queries are computed, one
group of the row after the other, and kept for the backward pass. FlexAttention caps them in its
kernel (`flex.py`).

Shape suffixes: `T` positions of the row, `L` of them on this rank (`row_params.py`), `Q`/`K` query
and key positions, `B` batch, `N` query heads, `M` key-value heads (M divides N), `D` head size.
"""

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idpo.mcore.attention.row_params import Group, RowParams

QUERY_BLOCK = 256
"""Queries whose scores exist at a time in the forward pass."""


def attend_row_capped(
    query_LBND: Tensor,
    key_TBMD: Tensor,
    value_TBMD: Tensor,
    *,
    row: RowParams,
    scale: float,
    window: int | None,
    cap: float,
) -> Tensor:
    """Attention within the row's groups, with the interface of `sdpa.attend_row` and a cap.

    Returns:
        `[L, 1, N, D]`; 0 where the row is padding.
    """
    own_L = row.own_positions_L
    bounds = [np.searchsorted(own_L, (start, stop)).tolist() for start, _, _, stop in row.groups]
    mask_key = ("visible keys", window)
    if mask_key not in row.derived:
        # It may be built in a scoring pass and used in training, where autograd rejects inference
        # tensors.
        with torch.inference_mode(False):
            row.derived[mask_key] = [
                _visible(group, window, own_L[first:last] - group[0], query_LBND.device)
                for group, (first, last) in zip(row.groups, bounds, strict=True)
            ]
    # A rank may have padding only. Its output needs a graph too: other ranks wait in backward.
    zero = query_LBND[:0].sum() + key_TBMD[:0].sum() + value_TBMD[:0].sum()
    outputs, end = [], 0
    for (start, _, _, stop), (first, last), visible_QK in zip(
        row.groups, bounds, row.derived[mask_key], strict=True
    ):
        outputs.append(torch.zeros_like(query_LBND[end:first]))
        parts = query_LBND[first:last], key_TBMD[start:stop], value_TBMD[start:stop]
        outputs.append(_attend(*parts, visible_QK=visible_QK, scale=scale, cap=cap))
        end = last
    outputs.append(torch.zeros_like(query_LBND[end:]) + zero)
    return torch.cat(outputs)


def attend_causal_capped(
    query_QBND: Tensor,
    key_KBMD: Tensor,
    value_KBMD: Tensor,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> Tensor:
    """Plain causal attention with a cap; the queries are the last Q of the K positions."""
    num_queries, num_keys = query_QBND.size(0), key_KBMD.size(0)
    whole = (0, num_keys, num_keys, num_keys)
    last_Q = np.arange(num_keys - num_queries, num_keys)
    visible_QK = _visible(whole, window, last_Q, query_QBND.device)
    return _attend(query_QBND, key_KBMD, value_KBMD, visible_QK=visible_QK, scale=scale, cap=cap)


def _visible(
    group: Group, window: int | None, query_Q: NDArray[np.int64], device: torch.device
) -> Tensor:
    """Which keys of a group some of its queries see: bool `[Q, K]`.

    `query_Q` counts from the group's first position. Without context parallelism Q is K: a model
    with a cap is for short rows on a CPU.
    """
    prompt, chosen, rejected = (end - start for start, end in itertools.pairwise(group))
    part_K = torch.repeat_interleave(
        torch.arange(3, device=device), torch.tensor([prompt, chosen, rejected], device=device)
    )
    # Both answers continue the positions of the prompt.
    position_K = torch.cat(
        [
            torch.arange(prompt + chosen, device=device),
            torch.arange(prompt, prompt + rejected, device=device),
        ]
    )
    own_Q = torch.from_numpy(query_Q).to(device)
    distance_QK = position_K[own_Q, None] - position_K
    same_QK = (part_K[own_Q, None] == part_K) | (part_K == 0)
    visible_QK = same_QK & (distance_QK >= 0)
    return visible_QK if window is None else visible_QK & (distance_QK < window)


def _attend(
    query_QBND: Tensor,
    key_KBMD: Tensor,
    value_KBMD: Tensor,
    *,
    visible_QK: Tensor,
    scale: float,
    cap: float,
) -> Tensor:
    """`[Q, B, N, D]`; each query sees at least itself."""
    repeats = query_QBND.size(2) // key_KBMD.size(2)
    key_BNDK = key_KBMD.repeat_interleave(repeats, dim=2).permute(1, 2, 3, 0)
    value_BNKD = value_KBMD.repeat_interleave(repeats, dim=2).permute(1, 2, 0, 3)
    outputs = []
    for query, visible in zip(
        query_QBND.split(QUERY_BLOCK), visible_QK.split(QUERY_BLOCK), strict=True
    ):
        scores_BNQK = torch.matmul(query.permute(1, 2, 0, 3), key_BNDK) * scale
        scores_BNQK = torch.tanh(scores_BNQK / cap) * cap
        scores_BNQK = scores_BNQK.masked_fill(~visible, -torch.inf)
        probs_BNQK = scores_BNQK.softmax(-1, dtype=torch.float32).to(query.dtype)
        outputs.append(torch.matmul(probs_BNQK, value_BNKD).permute(2, 0, 1, 3))
    return torch.cat(outputs)

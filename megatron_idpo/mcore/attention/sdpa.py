"""Row attention on a CPU: `scaled_dot_product_attention` on slices of each group.

Torch's CPU kernel is a flash kernel: it stores no score matrix, and reads grouped-query heads in
place. Without a mask it supports only the causal square. So a prompt is one call without a mask,
and an answer is one call per block of queries on *prompt + answer* with an explicit mask. A mask
depends on relative distances only, so it is a view of one small Toeplitz matrix per row and window,
used for every group and layer. No mask of the row's size exists.

Under context parallelism a rank has runs of a row's queries, and all its keys. Each run is such a
call on the keys up to its end.

On a CPU, half precision is computed in fp32. Torch's half-precision kernel generates machine code
for each new shape and never frees it (5 to 6 MB on a processor with AMX). Nearly every pair has a
new shape, so memory would grow with the number of pairs.

Shape suffixes: `T` positions of the row, `L` of them on this rank, `Q`/`K` queries and keys of one
call (queries are the last Q of the K positions), `B` batch, `N` query heads, `M` key-value heads (M
divides N), `D` head size.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_idpo.mcore.attention.row_params import RowParams

QUERY_BLOCK = 256
"""Queries per masked call. Limits the mask's size; keys after a block's last query are skipped."""

DEALT_QUERY_BLOCK = 64
"""The same for rows that are dealt to ranks. These may have 100,000 positions, and the mask has as
many columns."""


class _DistanceMask:
    """Additive masks by relative distance, all of them views of one Toeplitz matrix.

    Row i, column j of the matrix is the mask at distance `before + i - j`.
    """

    def __init__(
        self, max_keys: int, window: int | None, like: Tensor, max_rows: int = QUERY_BLOCK
    ) -> None:
        """For sequences of at most `max_keys` positions; dtype and device of `like`."""
        self.window = max_keys if window is None else min(window, max_keys)
        self.rows = min(max_rows, max_keys)
        # The first query of a block sees at most `window - 1` keys before itself.
        self.before = self.window - 1
        self.dtype, self.device = like.dtype, like.device
        self._matrix: Tensor | None = None

    def view(self, num_queries: int, num_keys: int) -> Tensor:
        """The `[Q, K]` mask of the last Q of K positions: 0 where visible, -inf elsewhere."""
        if self._matrix is None:
            # It may be built in a scoring pass and used in training, where autograd rejects
            # inference tensors.
            with torch.inference_mode(False):
                self._matrix = self._build()
        # In row 0, the query itself (distance 0) is column `before`; here it is key K - Q.
        first = self.before - (num_keys - num_queries)
        assert first >= 0 and num_queries <= self.rows, (num_queries, num_keys, self.before)
        return self._matrix[:num_queries, first : first + num_keys]

    def _build(self) -> Tensor:
        query = torch.arange(self.before, self.before + self.rows, device=self.device)
        distance = query[:, None] - torch.arange(self.before + self.rows, device=self.device)
        visible = (distance >= 0) & (distance < self.window)
        return torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~visible, -math.inf
        )


def attend_row(
    query_TBND: Tensor,
    key_TBMD: Tensor,
    value_TBMD: Tensor,
    *,
    row: RowParams,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention within the row's groups.

    Args:
        query_TBND: `[T, 1, N, D]`; `[L, 1, N, D]` of this rank's positions if the row is dealt.
        key_TBMD: `[T, 1, M, D]`.
        value_TBMD: `[T, 1, M, D]`.
        row: The structure. Masks are kept in its `derived`, one matrix per window.
        scale: Factor on the scores.
        window: A query sees keys at distances `0 <= q_pos - k_pos < window`; None sees all.

    Returns:
        In the shape of the queries, contiguous; 0 where the row is padding.
    """
    dtype = query_TBND.dtype
    query_TBND, key_TBMD, value_TBMD = _to_compute_dtype(query_TBND, key_TBMD, value_TBMD)
    mask_key = ("distance mask", window, query_TBND.dtype)
    if mask_key not in row.derived:
        max_keys = max(max(b2 - b0, b1 - b0 + b3 - b2) for b0, b1, b2, b3 in row.groups)
        max_rows = QUERY_BLOCK if row.share is None else DEALT_QUERY_BLOCK
        row.derived[mask_key] = _DistanceMask(max_keys, window, query_TBND, max_rows)
    mask: _DistanceMask = row.derived[mask_key]
    if row.share is not None:
        outputs = list(
            _attend_runs(query_TBND, key_TBMD, value_TBMD, row=row, mask=mask, scale=scale)
        )
        return torch.cat(outputs).to(dtype)

    # Lengths of gap, group, gap, ..., group, gap: together the whole row. `split`, not slices: its
    # backward is one concatenation, while the backward of each slice would allocate and add a
    # zero-filled gradient of the whole row.
    piece_lengths, end = [], 0
    for b0, _, _, b3 in row.groups:
        piece_lengths += [b0 - end, b3 - b0]
        end = b3
    piece_lengths.append(row.row_tokens - end)
    queries, keys, values = (x.split(piece_lengths) for x in (query_TBND, key_TBMD, value_TBMD))
    # Groups are the pieces at odd indices. Gaps are padding, whose output is 0.
    outputs = [torch.zeros_like(queries[0])]
    for i, (b0, b1, b2, b3) in enumerate(row.groups):
        lengths = (b1 - b0, b2 - b1, b3 - b2)
        group = (x[2 * i + 1] for x in (queries, keys, values))
        outputs += _attend_group(*group, lengths=lengths, mask=mask, scale=scale)
        outputs.append(torch.zeros_like(queries[2 * i + 2]))
    return torch.cat(outputs).to(dtype)


def attend_causal(
    query_QBND: Tensor, key_KBMD: Tensor, value_KBMD: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Plain causal attention; the queries are the last Q of the K positions.

    Args:
        query_QBND: `[Q, B, N, D]`; Q < K if keys come from a key-value cache.
        key_KBMD: `[K, B, M, D]`.
        value_KBMD: `[K, B, M, D]`.
        scale: Factor on the scores.
        window: As in `attend_row`.

    Returns:
        `[Q, B, N, D]`.
    """
    dtype = query_QBND.dtype
    query_QBND, key_KBMD, value_KBMD = _to_compute_dtype(query_QBND, key_KBMD, value_KBMD)
    mask = _DistanceMask(key_KBMD.size(0), window, query_QBND)
    return _attend(query_QBND, key_KBMD, value_KBMD, mask=mask, scale=scale).to(dtype)


def _to_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit tensors on a CPU as fp32 (see the module docstring); others unchanged."""
    return tuple(x.float() if x.device.type == "cpu" and x.itemsize < 4 else x for x in tensors)


def _attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: tuple[int, int, int],
    mask: _DistanceMask,
    scale: float,
) -> Iterator[Tensor]:
    """The outputs of prompt, chosen and rejected answer, in row order."""
    prompt, chosen, rejected = query.split(lengths)
    prompt_key, _, rejected_key = key.split(lengths)
    prompt_value, _, rejected_value = value.split(lengths)
    rejected_start = lengths[0] + lengths[1]
    # Empty parts are skipped: a plain sequence has no answers.
    if lengths[0]:
        yield _attend(prompt, prompt_key, prompt_value, mask=mask, scale=scale)
    if lengths[1]:
        # Prompt and chosen answer are adjacent in the row: a slice, no copy.
        keys_and_values = key[:rejected_start], value[:rejected_start]
        yield _attend(chosen, *keys_and_values, mask=mask, scale=scale)
    if lengths[2]:
        # One copy, without the chosen answer in between: index differences are distances again.
        keys = torch.cat([prompt_key, rejected_key])
        values = torch.cat([prompt_value, rejected_value])
        yield _attend(rejected, keys, values, mask=mask, scale=scale)


def _attend_runs(
    query_LBND: Tensor,
    key_TBMD: Tensor,
    value_TBMD: Tensor,
    *,
    row: RowParams,
    mask: _DistanceMask,
    scale: float,
) -> Iterator[Tensor]:
    """The outputs of this rank's positions in their order, `[Q, 1, N, D]` each, L together."""
    own_L, cuts, sequences = row.own_positions_L, [0], []
    for b0, b1, b2, b3 in row.groups:
        # Prompt and chosen answer are adjacent in the row: one causal sequence, no copy.
        for start, end, skipped in ((b0, b2, 0), (b2, b3, b2 - b1)):
            runs = list(_runs(own_L, start, end))
            cuts += [cut for run in runs for cut in run]
            sequences.append((b0, b1, start, end, skipped, runs))
    pieces = iter(query_LBND.split(np.diff([*cuts, len(own_L)]).tolist()))
    # This rank may have padding only. Its output needs a graph too: other ranks wait in backward.
    # Sums over empty slices are 0 for any padding; `0 * query` would propagate NaN.
    zero = query_LBND[:0].sum() + key_TBMD[:0].sum() + value_TBMD[:0].sum()
    yield torch.zeros_like(next(pieces)) + zero
    for b0, b1, start, end, skipped, runs in sequences:
        if not runs:
            continue
        keys, values = key_TBMD[b0:end], value_TBMD[b0:end]
        if skipped:
            # One copy, without the chosen answer in between: index differences are distances.
            keys, values = (torch.cat([x[b0:b1], x[start:end]]) for x in (key_TBMD, value_TBMD))
        for _, last in runs:
            num_keys = int(own_L[last - 1]) + 1 - b0 - skipped
            keys_and_values = keys[:num_keys], values[:num_keys]
            yield _attend(next(pieces), *keys_and_values, mask=mask, scale=scale)
            yield torch.zeros_like(next(pieces))


def _runs(own_L: NDArray[np.int64], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the runs of consecutive positions within `[start, end)` begin and end in `own_L`."""
    first, last = np.searchsorted(own_L, (start, end)).tolist()
    if first < last:
        breaks = first + 1 + np.flatnonzero(np.diff(own_L[first:last]) != 1)
        yield from pairwise([first, *breaks.tolist(), last])


def _attend(
    query_QBND: Tensor, key_KBMD: Tensor, value_KBMD: Tensor, *, mask: _DistanceMask, scale: float
) -> Tensor:
    """Causal attention of the last Q of K consecutive positions: `[Q, B, N, D]`."""
    num_queries, num_keys = query_QBND.size(0), key_KBMD.size(0)
    if num_queries == num_keys <= mask.window:
        # A causal square without an effective window: the kernel needs no mask.
        return _sdpa(query_QBND, key_KBMD, value_KBMD, scale=scale, mask_QK=None)
    outputs, end = [], num_keys - num_queries
    for block_QBND in query_QBND.split(mask.rows):
        # `end` is the position of the block's first query. Keys from the earliest that this query
        # sees to the block's last query; the others are invisible to the whole block.
        start, end = max(0, end - mask.window + 1), end + block_QBND.size(0)
        mask_QK = mask.view(block_QBND.size(0), end - start)
        keys_and_values = key_KBMD[start:end], value_KBMD[start:end]
        outputs.append(_sdpa(block_QBND, *keys_and_values, scale=scale, mask_QK=mask_QK))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sdpa(
    query_QBND: Tensor,
    key_KBMD: Tensor,
    value_KBMD: Tensor,
    *,
    scale: float,
    mask_QK: Tensor | None,
) -> Tensor:
    """One kernel call: causal if there is no mask."""
    output_BNQD = scaled_dot_product_attention(
        query_QBND.permute(1, 2, 0, 3),
        key_KBMD.permute(1, 2, 0, 3),
        value_KBMD.permute(1, 2, 0, 3),
        attn_mask=mask_QK,
        is_causal=mask_QK is None,
        scale=scale,
        enable_gqa=query_QBND.size(2) != key_KBMD.size(2),
    )
    return output_BNQD.permute(2, 0, 1, 3)

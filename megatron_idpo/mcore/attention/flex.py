"""Attention over a row with FlexAttention: one fused kernel for the whole row, on a GPU.

Which 128 x 128 blocks a row needs follows from its spans, so the block mask is computed from them
on the CPU, in microseconds and without a mask of the row's size, and kept on the row: one per
window, for every layer and for recomputation. Inside a block that is only partly visible the kernel
asks `_visible` per pair of positions.

The kernel is compiled for static shapes, at the first use of a row length with a window: rows are
cut to one length per step (`data.trim_tokens`), so there are a few dozen of them. Uncompiled,
FlexAttention is a plain (and T x T) implementation of the same meaning, through which the tests
check blocks and mask on a CPU.

Shape suffixes: `T` positions of the row, `N` query heads, `M` key-value heads (M divides N), `D`
head size, `I`/`J` blocks of queries and of keys.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_idpo.mcore.attention.row_params import Group, RowParams

BLOCK = 128
"""FlexAttention's default block of queries and of keys."""


def attend_row_flex(
    query_TBND: Tensor,
    key_TBMD: Tensor,
    value_TBMD: Tensor,
    *,
    row: RowParams,
    scale: float,
    window: int | None,
    backend: str | None = "inductor",
) -> Tensor:
    """Attention that honours the row's groups; the same contract as `attention_sdpa.attend_row`.

    Args:
        query_TBND: `[T, 1, N, D]`.
        key_TBMD: `[T, 1, M, D]`.
        value_TBMD: `[T, 1, M, D]`.
        row: The structure; at least one group that is not empty. The block mask is kept in its
            `derived`, one per window.
        scale: Factor on the scores.
        window: A query sees keys at distances `0 <= q_pos - k_pos < window`; None sees all.
        backend: Another one only in tests: torch.compile's, or None for the plain implementation.

    Returns:
        `[T, 1, N, D]`; 0 where the row is padding (FlexAttention's value for a query without keys).
    """
    mask_key = ("block mask", window)
    if mask_key not in row.derived:
        with torch.inference_mode(False):  # it may be built in a scoring pass and used in training
            row.derived[mask_key] = block_mask(row, window)
    attend: Any = flex_attention
    if backend is not None:
        attend = _compiled_flex_attention(row.row_tokens, window, backend)
    output_BNTD: Tensor = attend(
        query_TBND.permute(1, 2, 0, 3),
        key_TBMD.permute(1, 2, 0, 3),
        value_TBMD.permute(1, 2, 0, 3),
        block_mask=row.derived[mask_key],
        scale=scale,
        enable_gqa=query_TBND.size(2) != key_TBMD.size(2),
    )
    return output_BNTD.permute(2, 0, 1, 3)


def block_mask(row: RowParams, window: int | None) -> BlockMask:
    """The row's block mask, on the device of its position ids.

    Args:
        row: The structure.
        window: As in `attend_row_flex`.

    Returns:
        A mask `[1, 1, T, T]` with blocks of `BLOCK`: those that any pair needs, and among them
        those that every pair may use.
    """
    device = row.position_ids_T.device
    needed_IJ, full_IJ = _blocks(row, window)
    kv_num_blocks, kv_indices = _ordered(needed_IJ & ~full_IJ)
    full_kv_num_blocks, full_kv_indices = _ordered(full_IJ)
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(row, window),
        seq_lengths=(row.row_tokens, row.row_tokens),
    )
    return mask.to(device)


@functools.cache
def _compiled_flex_attention(
    row_tokens: int, window: int | None, backend: str
) -> Callable[..., Any]:
    """FlexAttention for one row length and window; this cache is the only state here.

    Rows of one length share a compilation, as their structure arrives in tensors. Dynamo counts
    compilations by code object and gives up at 8 (`recompile_limit`), which a few lengths with two
    windows reach; so each gets a code object of its own. Its 8 are for gradients on and off and the
    like. With `fullgraph`, exceeding them is an error instead of the slow implementation: whatever
    makes every row compile anew is noticed.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        return flex_attention(query, key, value, **arguments)

    name = f"flex_attention_{row_tokens}_{window or 'full'}"
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend=backend, dynamic=False, fullgraph=True)


def _visible(row: RowParams, window: int | None) -> Callable[[Any, Any, Any, Any], Any]:
    """Whether the query at one position of the row sees the key at another.

    Every answer and every prompt is a *part* with a number of its own. A query sees its own part
    and its group's prompt, backwards from its position. Padding is part -1, whose "prompt" -2 and
    own part are both excluded.
    """
    part_T = np.full(row.row_tokens, -1, dtype=np.int32)
    prompt_T = np.full(row.row_tokens, -2, dtype=np.int32)
    for i, (b0, b1, b2, b3) in enumerate(row.groups):
        part_T[b0:b1], part_T[b1:b2], part_T[b2:b3] = 3 * i, 3 * i + 1, 3 * i + 2
        prompt_T[b0:b3] = 3 * i
    position_T = row.position_ids_T.to(torch.int32)
    part_of_T = torch.from_numpy(part_T).to(position_T.device)
    prompt_of_T = torch.from_numpy(prompt_T).to(position_T.device)
    reach = row.row_tokens if window is None else window

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        part = part_of_T[key]
        together = (part == part_of_T[query]) | (part == prompt_of_T[query])
        distance = position_T[query] - position_T[key]
        return together & (part >= 0) & (distance >= 0) & (distance < reach)

    return visible


class _Rectangle(NamedTuple):
    """Queries `[query_start, query_end)` that look at keys `[key_start, key_end)`."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    skipped: int
    """Positions between the two that count no distance: the chosen answer, for a rejected one."""


def _rectangles(groups: tuple[Group, ...]) -> Iterator[_Rectangle]:
    for b0, b1, b2, b3 in groups:
        yield _Rectangle(b0, b2, b0, b2, 0)
        yield _Rectangle(b2, b3, b0, b1, b2 - b1)
        yield _Rectangle(b2, b3, b2, b3, 0)


def _blocks(row: RowParams, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Bool `[I, J]`: blocks with a visible pair, and blocks in which every pair is visible."""
    num_blocks = -(-row.row_tokens // BLOCK)
    needed_IJ = np.zeros((num_blocks, num_blocks), dtype=bool)
    full_IJ = np.zeros_like(needed_IJ)
    reach = row.row_tokens if window is None else window
    for query_start, query_end, key_start, key_end, skipped in _rectangles(row.groups):
        if query_start == query_end or key_start == key_end:
            continue
        rows, query_low, query_high = _cut(query_start, query_end)
        columns, key_low, key_high = _cut(key_start, key_end)
        nearest = query_low[:, None] - key_high[None, :] - skipped
        farthest = query_high[:, None] - key_low[None, :] - skipped
        whole = (query_high - query_low == BLOCK - 1)[:, None] & (key_high - key_low == BLOCK - 1)
        needed_IJ[rows, columns] |= (farthest >= 0) & (nearest < reach)
        full_IJ[rows, columns] |= whole & (nearest >= 0) & (farthest < reach)
    return needed_IJ, full_IJ


def _cut(start: int, end: int) -> tuple[slice, np.ndarray, np.ndarray]:
    """The blocks that `[start, end)` touches, with its first and last position in each."""
    first, behind = start // BLOCK, -(-end // BLOCK)
    low = np.arange(first, behind) * BLOCK
    return (
        slice(first, behind),
        np.maximum(low, start),
        np.minimum(low + BLOCK, end) - 1,
    )


def _ordered(blocks_IJ: np.ndarray) -> tuple[Tensor, Tensor]:
    """FlexAttention's form: how many key blocks, `[1, 1, I]`, and which, leading `[1, 1, I, J]`."""
    marked_first = np.argsort(~blocks_IJ, axis=1, kind="stable").astype(np.int32)
    counts = blocks_IJ.sum(axis=1, dtype=np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(marked_first)[None, None]

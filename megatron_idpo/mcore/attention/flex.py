"""Row attention on a GPU: FlexAttention, one fused kernel for the whole row.

FlexAttention skips 128 x 128 blocks without a visible pair of positions, and evaluates the mask
function (`_visible`) only in partly visible blocks. `create_block_mask` would evaluate it for all
T x T pairs; here the blocks are computed from the row's spans on the CPU, in microseconds, and kept
on the row: one block mask per window, used by every layer and in recomputation. Under context
parallelism the queries are this rank's positions and the mask is a rectangle, T/ranks x T.

The kernel is compiled for static shapes, at the first use of a row length with a window: rows are
trimmed to one length per step (`data.trim_tokens`), so there are a few dozen. Uncompiled,
FlexAttention computes the same with a T x T score matrix, which the tests use on a CPU.

Shape suffixes: `T` positions of the row, `L` of them on this rank (all without context
parallelism), `N` query heads, `M` key-value heads (M divides N), `D` head size, `I`/`J` blocks of
queries and of keys, `K` pieces of queries.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_idpo.mcore.attention.row_params import Group, RowParams
from megatron_idpo.mcore.cpu.redirect import to_device

BLOCK = 128
"""FlexAttention's default block of queries and of keys."""

_KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""Below 128 queries torch takes its decoding kernel, which does not compile if queries times the
query heads of a key-value head exceed a block."""

MIN_HEAD_DIM = 16
"""FlexAttention's kernels multiply tiles that are at least this wide."""


def attend_row_flex(
    query_LBND: Tensor,
    key_TBMD: Tensor,
    value_TBMD: Tensor,
    *,
    row: RowParams,
    scale: float,
    window: int | None,
    cap: float | None = None,
    backend: str | None = "inductor",
) -> Tensor:
    """Attention within the row's groups, with the interface of `sdpa.attend_row`.

    Args:
        query_LBND: `[L, 1, N, D]`.
        key_TBMD: `[T, 1, M, D]`.
        value_TBMD: `[T, 1, M, D]`.
        row: The structure, with at least one group that is not empty. Block masks are kept in its
            `derived`, one per window.
        scale: Factor on the scores.
        window: A query sees keys at distances `0 <= q_pos - k_pos < window`; None sees all.
        cap: c of `c tanh(score / c)` before the softmax; None: none.
        backend: Of torch.compile; None runs uncompiled. For tests.

    Returns:
        `[L, 1, N, D]`; 0 where the row is padding (FlexAttention's value for a query without keys).
    """
    mask_key = ("block mask", window)
    if mask_key not in row.derived:
        # It may be built in a scoring pass and used in training, where autograd rejects inference
        # tensors.
        with torch.inference_mode(False):
            row.derived[mask_key] = block_mask(row, window)
    attend: Any = flex_attention
    if backend is not None:
        attend = _compiled_flex_attention(row.own_tokens, row.row_tokens, window, backend)
    output_BNLD: Tensor = attend(
        query_LBND.permute(1, 2, 0, 3),
        key_TBMD.permute(1, 2, 0, 3),
        value_TBMD.permute(1, 2, 0, 3),
        score_mod=None if cap is None else _soft_cap(cap),
        block_mask=row.derived[mask_key],
        scale=scale,
        enable_gqa=query_LBND.size(2) != key_TBMD.size(2),
        kernel_options=dict(_KERNEL_OPTIONS),
    )
    return output_BNLD.permute(2, 0, 1, 3)


@functools.cache
def _soft_cap(cap: float) -> Callable[..., Any]:
    """The `score_mod` of a cap. Cached: another function would be compiled again."""

    def capped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(row: RowParams, window: int | None) -> BlockMask:
    """The row's block mask `[1, 1, L, T]`, on the device of its position ids.

    Args:
        row: The structure.
        window: As in `attend_row_flex`.
    """
    needed_IJ, full_IJ = _blocks(row, window)
    # FlexAttention keeps two lists: partial blocks, where it calls mask_mod, and full ones, where
    # it does not. A block in both would be counted twice in the softmax. The backward pass also
    # reads them by key block.
    partial_IJ = needed_IJ & ~full_IJ
    lists = [_block_lists(blocks) for blocks in (partial_IJ, full_IJ, partial_IJ.T, full_IJ.T)]
    part_T, prompt_T = _parts(row)
    own_L = row.own_positions_L
    arrays = [part_T, part_T[own_L], prompt_T[own_L], *(array for pair in lists for array in pair)]
    key_part_T, part_L, prompt_L, *blocks = _copied_together(arrays, row.position_ids_T.device)
    kv_num, kv, full_kv_num, full_kv, q_num, q, full_q_num, full_q = (b[None, None] for b in blocks)
    return BlockMask(
        seq_lengths=(row.own_tokens, row.row_tokens),
        kv_num_blocks=kv_num,
        kv_indices=kv,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv,
        q_num_blocks=q_num,
        q_indices=q,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_visible(row, window, key_part_T, part_L, prompt_L),
    )


@functools.cache
def _compiled_flex_attention(
    own_tokens: int, row_tokens: int, window: int | None, backend: str
) -> Callable[..., Any]:
    """FlexAttention compiled for one row length, the rank's part of it, and one window.

    Rows of one length share a compilation, because their structure is in tensors. Dynamo counts
    compilations per code object and gives up at 8 (`recompile_limit`), which a few lengths with two
    windows reach. So each pair gets a separate code object, whose 8 are left for gradients on and
    off and the like. With `fullgraph`, reaching the limit is an error instead of a fallback to the
    slow implementation, so recompilation per row cannot go unnoticed.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        return flex_attention(query, key, value, **arguments)

    name = f"flex_attention_{own_tokens}_{row_tokens}_{window or 'full'}"
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend=backend, dynamic=False, fullgraph=True)


def _copied_together(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The int32 arrays on a device, in one copy that the host does not wait for."""
    # Triton has faster kernels for addresses that are multiples of 16 bytes.
    padded = [np.pad(array.ravel(), (0, -array.size % 4)) for array in arrays]
    together = to_device(torch.from_numpy(np.concatenate(padded)), device)
    tensors = together.split([array.size for array in padded])
    return [
        tensor[: array.size].view(array.shape)
        for tensor, array in zip(tensors, arrays, strict=True)
    ]


def _parts(row: RowParams) -> tuple[np.ndarray, np.ndarray]:
    """The part of each position, and the part that is its prompt; int32 `[T]` each.

    Each prompt and each answer is a *part* with a unique index.
    """
    # Padding is part -1 with prompt -2: a padding query matches no prompt or answer, and the test
    # part >= 0 excludes padding keys.
    part_T = np.full(row.row_tokens, -1, dtype=np.int32)
    prompt_T = np.full(row.row_tokens, -2, dtype=np.int32)
    for i, (b0, b1, b2, b3) in enumerate(row.groups):
        part_T[b0:b1], part_T[b1:b2], part_T[b2:b3] = 3 * i, 3 * i + 1, 3 * i + 2
        prompt_T[b0:b3] = 3 * i
    return part_T, prompt_T


def _visible(
    row: RowParams, window: int | None, part_T: Tensor, part_L: Tensor, prompt_L: Tensor
) -> Callable[[Any, Any, Any, Any], Any]:
    """The `mask_mod`: whether a query of this rank sees the key at a position of the row.

    A query sees keys of the same part and of its group's prompt, at distances from 0 to the window.
    """
    # Distances are differences of position ids, not of row positions: between a rejected answer and
    # its prompt lies the chosen answer.
    position_T = row.position_ids_T.to(torch.int32)
    position_L = row.own_position_ids_L.to(torch.int32)
    max_distance = row.row_tokens if window is None else window

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        part = part_T[key]
        same_sequence = (part == part_L[query]) | (part == prompt_L[query])
        distance = position_L[query] - position_T[key]
        return same_sequence & (part >= 0) & (distance >= 0) & (distance < max_distance)

    return visible


class _Rectangle(NamedTuple):
    """Queries `[query_start, query_end)` and the keys `[key_start, key_end)` that they may see."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    skipped: int
    """Row positions between keys and queries that do not count as distance: the chosen answer,
    between a prompt and its rejected answer."""


def _rectangles(groups: tuple[Group, ...]) -> Iterator[_Rectangle]:
    for b0, b1, b2, b3 in groups:
        yield _Rectangle(b0, b2, b0, b2, 0)  # prompt and chosen answer: one causal sequence
        yield _Rectangle(b2, b3, b0, b1, b2 - b1)  # rejected answer on the prompt
        yield _Rectangle(b2, b3, b2, b3, 0)  # rejected answer on itself


class _Pieces(NamedTuple):
    """Consecutive positions of the row within one block of queries."""

    block_K: np.ndarray
    first_K: np.ndarray
    """Position of the first query."""

    last_K: np.ndarray

    @classmethod
    def of(cls, own_L: np.ndarray) -> Self:
        """The pieces of queries at these positions, ascending."""
        block_L = np.arange(len(own_L)) // BLOCK
        is_last_L = np.append((np.diff(own_L) != 1) | (np.diff(block_L) != 0), True)
        is_first_L = np.append(True, is_last_L[:-1])
        return cls(block_L[is_first_L], own_L[is_first_L], own_L[is_last_L])

    def within(self, start: int, end: int) -> Self:
        """The parts of them within `[start, end)`."""
        first_K, last_K = np.maximum(self.first_K, start), np.minimum(self.last_K, end - 1)
        kept_K = first_K <= last_K
        return type(self)(self.block_K[kept_K], first_K[kept_K], last_K[kept_K])


def _blocks(row: RowParams, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Two bool `[I, J]`: blocks with a visible pair, and blocks in which every pair is visible."""
    pieces = _Pieces.of(row.own_positions_L)
    num_query_blocks, num_key_blocks = (-(-n // BLOCK) for n in (row.own_tokens, row.row_tokens))
    needed_IJ = np.zeros((num_query_blocks, num_key_blocks), dtype=bool)
    # Queries of a block that see every key of a key block. A query sees it through one rectangle.
    complete_IJ = np.zeros(needed_IJ.shape, dtype=np.int64)
    max_distance = row.row_tokens if window is None else window
    for query_start, query_end, key_start, key_end, skipped in _rectangles(row.groups):
        rows, query_first, query_last = pieces.within(query_start, query_end)
        if not len(rows) or key_start == key_end:
            continue
        columns, key_first, key_last = _blocks_of(key_start, key_end)
        # Smallest and largest distance q_pos - k_pos of any pair of a piece and a key block.
        # Distances take all values in between, so there is a visible pair iff the interval meets
        # [0, max_distance), and all pairs are visible iff it lies inside.
        smallest_KJ = query_first[:, None] - key_last[None, :] - skipped
        largest_KJ = query_last[:, None] - key_first[None, :] - skipped
        is_needed_KJ = (largest_KJ >= 0) & (smallest_KJ < max_distance)
        # A key block that the rectangle covers partly also has keys outside it.
        is_complete_KJ = (smallest_KJ >= 0) & (largest_KJ < max_distance)
        is_complete_KJ &= key_last - key_first == BLOCK - 1
        # `at`: several pieces may be in one block.
        np.logical_or.at(needed_IJ[:, columns], rows, is_needed_KJ)
        num_queries_K = query_last - query_first + 1
        np.add.at(complete_IJ[:, columns], rows, is_complete_KJ * num_queries_K[:, None])
    return needed_IJ, complete_IJ == BLOCK


def _blocks_of(start: int, end: int) -> tuple[slice, np.ndarray, np.ndarray]:
    """The blocks that `[start, end)` touches, and its first and last position in each."""
    first_block, end_block = start // BLOCK, -(-end // BLOCK)
    block_start = np.arange(first_block, end_block) * BLOCK
    return (
        slice(first_block, end_block),
        np.maximum(block_start, start),
        np.minimum(block_start + BLOCK, end) - 1,
    )


def _block_lists(blocks_IJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FlexAttention's format, int32: the number of key blocks per query block, `[I]`, and their
    indices, which come first in `[I, J]`."""
    # False sorts before True, and a stable sort keeps the key blocks in ascending order.
    indices_IJ = np.argsort(~blocks_IJ, axis=1, kind="stable").astype(np.int32)
    return blocks_IJ.sum(axis=1, dtype=np.int32), indices_IJ

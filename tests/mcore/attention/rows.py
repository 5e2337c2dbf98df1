"""Rows and their visible pairs, for the tests of both attention backends."""

import torch
from hypothesis import strategies as st

from megatron_idpo.data.packing.dealing import deal_positions
from megatron_idpo.mcore.attention.row_params import ContextShare, RowParams

Groups = list[tuple[int, int, int, int]]

# Answers of different lengths, gaps, an empty answer, plain sequences, and padding at the end.
MIXED: Groups = [
    (0, 5, 9, 16),
    (16, 19, 26, 28),
    (30, 37, 37, 37),
    (37, 41, 45, 45),
    (45, 46, 47, 50),
]
PLAIN: Groups = [(0, 11, 11, 11), (11, 30, 30, 30), (33, 34, 34, 34)]
ROW_TOKENS = 57
"""Of a row with the groups above."""


def make_row(groups: Groups, tokens: int, device: str = "cpu") -> RowParams:
    position_ids = torch.zeros(tokens, dtype=torch.int64)
    for b0, b1, b2, b3 in groups:
        position_ids[b0:b2] = torch.arange(b2 - b0)
        position_ids[b2:b3] = torch.arange(b1 - b0, b1 - b0 + b3 - b2)
    spans = torch.tensor(groups, dtype=torch.int32).reshape(-1, 4)
    return RowParams.of(position_ids.to(device), spans)


def visible_pairs(groups: Groups, tokens: int, window: int | None) -> torch.Tensor:
    """Bool `[query, key]`: the definition, pair by pair."""
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for b0, b1, b2, b3 in groups:
        prompt, chosen, rejected = range(b0, b1), range(b1, b2), range(b2, b3)
        for sequence in ([*prompt, *chosen], [*prompt, *rejected]):
            for q_position, q in enumerate(sequence):
                for k_position, k in enumerate(sequence[: q_position + 1]):
                    visible[q, k] |= window is None or q_position - k_position < window
    return visible


@st.composite
def row_structures(draw: st.DrawFn) -> tuple[Groups, int]:
    """Groups of any lengths with gaps between them, and the row's length with padding."""
    groups: Groups = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        bounds = [end + draw(st.integers(0, 3))]
        for _ in range(3):
            bounds.append(bounds[-1] + draw(st.integers(0, 9)))
        groups.append((bounds[0], bounds[1], bounds[2], bounds[3]))
        end = bounds[-1]
    return groups, end + draw(st.integers(1, 4))


def dealt_rows(groups: Groups, tokens: int, ranks: int, device: str = "cpu") -> list[RowParams]:
    """The row as each context-parallel rank has it; its length is rounded up to the ranks."""
    tokens += -tokens % ranks
    whole = make_row(groups, tokens, device)
    positions_RL = deal_positions(whole.spans_G4.numpy(), tokens, ranks)
    shares = (ContextShare.of(positions_RL, rank, device) for rank in range(ranks))
    return [RowParams.of(whole.position_ids_T, whole.spans_G4, 0.0, share) for share in shares]

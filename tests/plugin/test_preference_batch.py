"""Targets and preference batches: constructors, sums over sequences, order of answers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import megatron_idpo
from megatron_idpo.errors import DataError
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.targets import Targets

POSITIONS = 8


def targets(sequences: list[int], num_sequences: int) -> Targets:
    count = torch.arange(len(sequences))
    ids = torch.tensor(sequences, dtype=torch.int64)
    return Targets(count, count + 1, ids, num_sequences, shape=(1, POSITIONS))


def batch(**fields: Any) -> PreferenceBatch:
    return PreferenceBatch(**{"targets": targets([0, 0, 0, 1, 1], 2), **fields})


def test_public_names_are_imported_on_first_use():
    for name in megatron_idpo.__all__:
        value = getattr(megatron_idpo, name)
        # `train` is also a package, which can be called.
        assert callable(value) and value.__name__.rpartition(".")[2] == name
    assert megatron_idpo.Targets is Targets
    with pytest.raises(AttributeError, match="no attribute 'MicroBatch'"):
        _ = megatron_idpo.MicroBatch


# ---- constructors --------------------------------------------------------------------------------

TOKENS = torch.arange(100, 112).view(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 0]])
"""Two turns in the first row, left padding (say) in the second."""


def test_mask_selects_the_positions_before_the_tokens():
    made = Targets.from_mask(TOKENS, MASK)
    assert made.tokens_N.tolist() == [102, 103, 105, 109, 110]
    # Position s of row b is index 2 * s + b of the flattened [S, B].
    hidden_SB = torch.arange(12).view(6, 2)
    assert made.positions_N.tolist() == [
        hidden_SB[s, b] for s, b in ((1, 0), (2, 0), (4, 0), (2, 1), (3, 1))
    ]
    assert made.sequences_N.tolist() == [0, 0, 0, 1, 1] and made.num_sequences == 2
    assert made.validate() == [] and made.shape == (2, 6)


def test_lengths_are_a_shortcut_for_one_prompt_and_one_answer():
    made = Targets.from_lengths(TOKENS, [2, 3], [5, 4])
    assert made.tokens_N.tolist() == [102, 103, 104, 109]
    assert made.sequences_N.tolist() == [0, 0, 0, 1]


def test_packed_sequences_are_found_by_their_bounds():
    tokens = torch.arange(100, 112)[None]
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]])
    made = Targets.from_packed(tokens, torch.tensor([0, 3, 7, 12], dtype=torch.int32), mask)
    assert made.positions_N.tolist() == [0, 1, 4]
    assert made.tokens_N.tolist() == [101, 102, 105]
    assert made.sequences_N.tolist() == [0, 0, 1]
    assert made.num_sequences == 2, "the last sequence is padding"


def test_batch_without_response_tokens_has_no_pairs():
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    packed = Targets.from_packed(TOKENS.view(1, 12), [0, 12], nothing.view(1, 12))
    for made in (Targets.from_mask(TOKENS, nothing), packed):
        assert PreferenceBatch(made).num_pairs == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Targets.from_mask(TOKENS, MASK[:, 1:]), "not one [B, S]"),
        (lambda: Targets.from_mask(TOKENS, MASK + 1), "sequence 0 begins with a response token"),
        (
            lambda: Targets.from_mask(TOKENS, MASK * torch.tensor([[1], [0]])),
            "sequence 1 of 2 has no",
        ),
        (lambda: Targets.from_lengths(TOKENS, [2], [5, 4]), "1 and 2 lengths for 2 rows"),
        (lambda: Targets.from_lengths(TOKENS, [2, 2], [5, 7]), "a length of 7 in rows of 6"),
        (
            lambda: Targets.from_packed(TOKENS[0], [0, 2, 6], MASK[0]),
            "sequence 1 begins with a response token",
        ),
        (lambda: Targets.from_packed(TOKENS[0], [0, 7], MASK[0]), "bounds [0, 7]"),
        (lambda: Targets.from_packed(TOKENS[0], [3, 6], MASK[0]), "bounds [3, 6]"),
        (
            lambda: Targets.from_packed(TOKENS[0], [0, 5], MASK[0]),
            "a response token at 5, but the last sequence ends at 5",
        ),
    ],
)
def test_what_cannot_be_scored_is_reported(make, message):
    with pytest.raises(DataError) as caught:
        make()
    assert message in str(caught.value)


# ---- comparison with the model's input -----------------------------------------------------------


def test_targets_are_compared_with_the_tokens_of_the_call():
    made = Targets.from_mask(TOKENS, MASK)
    packed = Targets.from_packed(TOKENS.view(1, 12), [0, 6, 12], MASK.view(1, 12))
    for own, tokens in ((made, TOKENS), (packed, TOKENS.view(1, 12))):
        assert own.count_mismatches(tokens) == 0
        assert own.count_mismatches(tokens + 1) == len(own.tokens_N)
        changed = tokens.clone().flatten()
        changed[[5, 0, 4]] += 1  # one response token and two of prompts and padding
        assert own.count_mismatches(changed.view_as(tokens)) == 1
    assert targets([0, 1], 2).count_mismatches(TOKENS) is None, "it does not know where they are"


def test_digest_differs_between_micro_batches_and_is_kept_on_a_gpu():
    made = Targets.from_mask(TOKENS, MASK)
    others = [
        Targets.from_mask(TOKENS + 1, MASK),
        Targets.from_mask(TOKENS.flip(0), MASK),
        Targets.from_mask(TOKENS, MASK.flip(0)),
        Targets.from_packed(TOKENS.view(1, 12), [0, 6, 12], MASK.view(1, 12)),
    ]
    digests = [one.digest for one in (made, *others)]
    assert None not in digests and len(set(digests)) == len(digests)
    assert made.to("meta").digest == made.digest == Targets.from_mask(TOKENS, MASK).digest
    unknown = replace(made, digest=None)
    assert int(unknown.current_digest()) == made.digest


# ---- context parallelism -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_context_ranks_share_the_targets_in_zigzag_order(size):
    num_rows, num_positions = 3, 16
    tokens = torch.arange(num_rows * num_positions).view(num_rows, num_positions)
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    whole = Targets.from_mask(tokens, mask)
    seen = []
    for rank in range(size):
        # As megatron-core's get_batch_on_this_cp_rank cuts a batch.
        parts = tokens.view(num_rows, 2 * size, -1)[:, [rank, 2 * size - 1 - rank]].flatten(1)
        own = whole.on_context_rank(rank, size)
        changed = parts.clone()
        changed[1, -1] += 1
        assert whole.count_mismatches(parts, rank, size) == 0
        assert whole.count_mismatches(changed, rank, size) == 1
        predicted_from = parts.t().flatten()[own.positions_N]
        assert torch.equal(predicted_from + 1, own.tokens_N), (
            "a token is predicted by the one before"
        )
        assert own.num_sequences == num_rows
        seen += own.tokens_N.tolist()
    assert sorted(seen) == sorted(whole.tokens_N.tolist())


def test_context_ranks_cut_every_packed_sequence():
    tokens = torch.arange(12)
    mask = torch.ones(12)
    mask[[0, 8]] = 0
    whole = Targets.from_packed(tokens, [0, 8, 12], mask)
    held = {0: [0, 1, 6, 7, 8, 11], 1: [2, 3, 4, 5, 9, 10]}
    for rank, own_tokens in held.items():
        own = whole.on_context_rank(rank, 2)
        predicted_from = torch.tensor(own_tokens)[own.positions_N]
        assert torch.equal(predicted_from + 1, own.tokens_N)
    with pytest.raises(DataError, match="pad each to a multiple of 8 positions"):
        whole.on_context_rank(0, 4)


# ---- sums and order ------------------------------------------------------------------------------


def test_sums_and_lengths_of_sequences_in_any_order():
    mixed = targets([1, 0, 3, 2, 1, 3, 3], 4)
    values_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], requires_grad=True)
    sums_Q = mixed.sum_by_sequence(values_N)
    assert sums_Q.tolist() == [2.0, 17.0, 8.0, 100.0]
    sums_Q[1].backward()
    assert values_N.grad.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert mixed.lengths().tolist() == [1.0, 2.0, 1.0, 3.0]
    assert mixed.lengths().dtype == torch.float32


def test_pairs_name_chosen_and_rejected_sequences():
    four = targets([0, 1, 1, 2, 2, 2, 3], 4)
    assert PreferenceBatch(four).lengths().tolist() == [1, 2, 3, 1]
    named = PreferenceBatch(four, pairs=torch.tensor([[2, 1], [2, 0], [3, 0]]))
    assert named.num_pairs == 3
    assert named.lengths().tolist() == [3, 2, 3, 1, 1, 1]
    assert PreferenceBatch(four, pairs=torch.zeros(0, 2, dtype=torch.int64)).num_pairs == 0


def test_empty_batch_is_connected_to_the_graph():
    empty = targets([], 0)
    values_N = torch.zeros(0, requires_grad=True)
    sums_Q = empty.sum_by_sequence(values_N)
    assert sums_Q.shape == (0,) and sums_Q.requires_grad
    sums_Q.sum().backward()
    assert values_N.grad.shape == (0,)
    assert PreferenceBatch(empty).num_pairs == 0


# ---- validation ----------------------------------------------------------------------------------


def test_all_problems_are_reported_with_the_micro_batch_index():
    valid = targets([0, 0, 0, 1, 1], 2)
    wrong = {2: torch.zeros(3), 4: torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(DataError) as caught:
        batch(
            index=7,
            targets=replace(valid, positions_N=valid.positions_N + POSITIONS),
            reference_logps=wrong,
        )
    message = str(caught.value)
    assert message.startswith("3 problems") and message.count("micro-batch 7") == 3
    assert "has values from 8 to 12" in message and "[2] has shape (3,)" in message
    assert "[4] is torch.float16" in message


def invalid_targets() -> dict[str, tuple[Targets, str]]:
    valid = targets([0, 0, 0, 1, 1], 2)
    return {
        "position too large": (
            replace(valid, positions_N=valid.positions_N + 4),
            "from 4 to 8, but there are 8",
        ),
        "negative position": (
            replace(valid, positions_N=valid.positions_N - 1),
            "positions_N has values from -1",
        ),
        "unknown sequence": (targets([0, 0, 0, 1, 2], 2), "from 0 to 2, but there are 2 sequences"),
        "sequence without target": (targets([0, 0, 0, 0, 0], 2), "a sequence has no target"),
        "unequal lengths": (replace(valid, tokens_N=valid.tokens_N[1:]), "not one [N]"),
        "two dimensions": (replace(valid, tokens_N=valid.tokens_N[None]), "not one [N]"),
        "not integers": (replace(valid, tokens_N=valid.tokens_N.float()), "not all int64"),
        "no sequences counted": (replace(valid, num_sequences=0), "5 targets for 0 sequences"),
        "no targets": (targets([], 2), "0 targets for 2 sequences"),
        "odd number": (targets([0, 1, 2], 3), "3 sequences do not alternate"),
    }


@pytest.mark.parametrize("name", invalid_targets())
def test_invalid_targets_are_reported(name):
    invalid, message = invalid_targets()[name]
    with pytest.raises(DataError) as caught:
        batch(targets=invalid)
    assert message in str(caught.value) and "from the same sequences" in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.tensor([[0, 2]]), "pairs name sequences 0 to 2 of 2"),
        (torch.tensor([0, 1]), "of shape (2,), not int64 [P, 2]"),
        (torch.tensor([[0.0, 1.0]]), "pairs are torch.float32"),
        (torch.tensor([[0, 1], [1, 1]]), "pair 1 has sequence 1 twice"),
    ],
)
def test_invalid_pairs_are_reported(pairs, message):
    with pytest.raises(DataError) as caught:
        batch(pairs=pairs)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_reference_log_probabilities_must_be_finite(value):
    with pytest.raises(DataError, match=r"reference_logps\[4\] has NaN or inf"):
        batch(reference_logps={4: torch.tensor([-1.0, value])})


def test_reference_free_excludes_reference_log_probabilities():
    with pytest.raises(DataError, match="has reference_logps although it is reference_free"):
        batch(reference_free=True, reference_logps={4: torch.zeros(2)})


def test_values_on_a_gpu_are_not_read():
    """Reading would synchronize; `meta` tensors have no values at all."""
    on_meta = batch(pairs=torch.tensor([[1, 0]])).to("meta")
    assert on_meta.targets.positions_N.device.type == "meta" and on_meta.num_pairs == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_log_probabilities_may_be_float32_or_float64(dtype):
    assert batch(reference_logps={4: torch.zeros(2, dtype=dtype)}).reference_logps

"""The figures, worked out by hand or against the rows that training really builds."""

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_idpo.data.inspect import statistics as look_numbers
from megatron_idpo.data.inspect.statistics import Spread, length_figures, row_figures, sampled_steps
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.tokenize.pair import Pair
from megatron_idpo.errors import DataError


class MadePairs:
    """Pairs of the given lengths, all of one token."""

    def __init__(self, lengths_P3: NDArray[np.int32]) -> None:
        self.lengths_P3 = lengths_P3
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.lengths_P3)

    def __getitem__(self, index: int) -> Pair:
        self.fetched += 1
        return Pair(index, *(np.ones(length, np.int32) for length in self.lengths_P3[index]))


def made_pairs(num_pairs: int, longest: int = 60) -> MadePairs:
    random = np.random.default_rng(3)
    return MadePairs(random.integers(1, longest + 1, (num_pairs, 3), dtype=np.int32))


def test_a_spread_is_made_of_values_that_occur() -> None:
    assert Spread.of(np.array([5, 1, 9, 3])) == Spread(1, 3, 9, 9)
    assert Spread.of(np.arange(1, 101)) == Spread(1, 50, 90, 100)
    assert Spread.of(np.array([7])) == Spread(7, 7, 7, 7)


def test_lengths_and_what_sharing_saves() -> None:
    lengths_P3 = np.array([[10, 1, 2], [20, 3, 4], [30, 50, 60]], np.int32)
    found = length_figures(lengths_P3, share_prompt=True)
    assert found.parts == {
        "prompt": Spread(10, 20, 30, 30),
        "chosen": Spread(1, 3, 50, 50),
        "rejected": Spread(2, 4, 60, 60),
        "pair": Spread(13, 27, 140, 140),
    }
    assert found.sharing_gain == (2 * 60 + 120) / (60 + 120)
    apart = length_figures(lengths_P3, share_prompt=False)
    assert apart.parts["pair"] == Spread(23, 47, 170, 170)
    assert apart.sharing_gain == found.sharing_gain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prompt": False, "trim_tokens": 0},
        {"data_size": 3, "rows_multiple": 2},
    ],
)
def test_rows_are_those_that_training_builds(options: dict[str, int]) -> None:
    """Over all steps and all ranks, without a single pair's tokens."""
    pairs, run = made_pairs(50), {"global_batch_pairs": 8, "seed": 5, "epochs": 2}
    settings = {"row_tokens": 512, "pad_token": 0, "trim_tokens": 32, **options}
    found = row_figures(pairs, RowSettings(**settings), **run)
    assert pairs.fetched == 0
    assert (found.steps, found.left_over_pairs) == (12, 4)
    ranks = [
        list(TrainingBatches(pairs, RowSettings(**settings, data_rank=rank), **run))
        if "data_size" in options
        else list(TrainingBatches(pairs, RowSettings(**settings), **run))
        for rank in range(options.get("data_size", 1))
    ]
    assert found.rows_S.tolist() == [len(batch.rows) for batch in ranks[0]]
    assert found.length_S.tolist() == [batch.row_tokens for batch in ranks[0]]
    rows = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.rows]
    assert found.pairs_R.tolist() == [row.num_pairs for row in rows]
    assert found.used_R.tolist() == [row.used_tokens for row in rows]
    assert found.fill_R.tolist() == [row.used_tokens / len(row.tokens_T) for row in rows]
    used, computed = (
        sum(getattr(batch, name) for batch in ranks[0])
        for name in ("used_tokens", "computed_tokens")
    )
    assert found.fill == used / computed


def test_a_long_run_is_sampled_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sampled_steps(3, 10)) == [0, 1, 2]
    steps = list(sampled_steps(1000, 10))
    assert steps == list(range(0, 1000, 5))
    assert len(list(sampled_steps(10**6, 2**15))) == 4
    assert list(sampled_steps(10**6, 10**9)) == [0]
    monkeypatch.setattr(look_numbers, "SAMPLED_STEPS", 2)
    settings = RowSettings(row_tokens=512, pad_token=0)
    run = {"global_batch_pairs": 5, "seed": 0, "epochs": 1}
    found = row_figures(made_pairs(50), settings, **run)
    assert (found.steps, len(found.rows_S), int(found.pairs_R.sum())) == (10, 2, 10)


def test_what_cannot_be_trained_is_refused() -> None:
    run = {"global_batch_pairs": 5, "seed": 0, "epochs": 1}
    with pytest.raises(DataError, match=r"data\.row_tokens"):
        row_figures(made_pairs(50), RowSettings(row_tokens=64, pad_token=0), **run)
    with pytest.raises(DataError, match=r"training\.global_batch_pairs"):
        row_figures(made_pairs(3), RowSettings(row_tokens=512, pad_token=0), **run)

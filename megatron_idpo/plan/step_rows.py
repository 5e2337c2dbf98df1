"""The rows of a step as the packer would make them, for a batch of typical lengths.

The run's own packer (`data.packing.plan`) packs a batch whose lengths are spread as in preference
data: on a GPU rows are trimmed to at most four lengths, so that they are longer than what is in
them, and a pipeline pads all rows of a step to the fullest one.

    B  pairs of a global batch
"""

from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from megatron_idpo.data.packing.plan import coarse_trim_tokens, plan_rows, trimmed_length
from megatron_idpo.data.pairs import IntArray, pair_tokens
from megatron_idpo.plan.run_sizes import RunSizes

SPREAD = 0.5
"""Standard deviation of the logarithm of a pair's length: a longest twentieth of 1.9 times the
mean. Real data sets have 0.4 to 0.8."""

MAX_PACKED_PAIRS = 1024
"""Above, one replica's share is packed alone: packing takes time that grows with the square."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """What one replica computes in a step; that of the fullest one."""

    rows: int
    row_tokens: int
    """Positions of a row on average, padding included."""

    used_share: float
    """Positions that hold a token."""

    def of(self, run: RunSizes) -> RunSizes:
        """The run with these rows instead of full ones, for the time of a row."""
        shards = run.layout.tensor * run.layout.context
        tokens = -(-self.row_tokens // shards) * shards
        return replace(run, row_tokens=tokens, used_share=self.used_share)


def step_rows(run: RunSizes, *, is_gpu: bool = True) -> StepRows:
    """The rows of an average step."""
    trim = run.trim_tokens
    if is_gpu:
        trim = coarse_trim_tokens(run.row_tokens, trim)
    pairs, ranks = max(run.global_batch_pairs, run.data), run.data
    if pairs > MAX_PACKED_PAIRS:
        pairs, ranks = -(-pairs // ranks), 1
    multiple = run.layout.pipeline if run.layout.virtual_pipeline > 1 else 1
    mean, longest = run.assumed.pair_tokens, run.longest_pair_tokens
    is_separate = run.layout.pipeline == 1
    return _packed(pairs, ranks, multiple, mean, longest, run.row_tokens, trim, is_separate)


@cache
def _packed(
    pairs: int,
    ranks: int,
    multiple: int,
    mean: int,
    longest: int,
    row_tokens: int,
    trim: int,
    is_separate: bool,
) -> StepRows:
    lengths_B3 = _lengths(pairs, mean, longest)
    packed = plan_rows(
        lengths_B3, row_tokens=row_tokens, trim_tokens=trim, ranks=ranks, multiple=multiple
    )
    tokens_B = pair_tokens(lengths_B3, share_prompt=True)
    rows = len(packed.pairs[0])
    computed = [rows * packed.row_tokens] * ranks
    if is_separate:  # each row is trimmed to what is in it
        computed = [
            sum(
                trimmed_length(
                    int(tokens_B[row].sum()), row_tokens=packed.row_tokens, trim_tokens=trim
                )
                for row in rank
            )
            for rank in packed.pairs
        ]
    slowest = max(computed)
    return StepRows(rows, -(-slowest // rows), int(tokens_B.sum()) / (ranks * slowest))


def _lengths(pairs: int, mean: int, longest: int) -> IntArray:
    """Prompt and answers of a batch with the quantiles of a lognormal distribution."""
    normal = NormalDist()
    quantiles_B = np.array([normal.inv_cdf((pair + 0.5) / pairs) for pair in range(pairs)])
    tokens_B = np.exp(SPREAD * quantiles_B)
    for _ in range(3):  # the cap lowers the mean
        tokens_B = np.minimum(tokens_B * (mean / tokens_B.mean()), longest)
    total_B = np.maximum(tokens_B.astype(np.int64), 3)
    prompt_B = total_B // 4
    chosen_B = (total_B - prompt_B) // 2
    return np.stack([prompt_B, chosen_B, total_B - prompt_B - chosen_B], axis=1)

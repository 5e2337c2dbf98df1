"""Work of context-parallel ranks: the fullest over the mean, for rows of real preference files.

    python benchmarks/balance.py --tokenizer DIR [FILES] [--save]
    python benchmarks/balance.py --synthetic-lengths [FILES] [--save]

Rows are planned and dealt as in training (`megatron_idpo.data.packing`), for one data-parallel rank
and global batches of 128 pairs, trimmed as on a GPU. For each file and row length the largest value
of any row, of

* **keys**: keys that the queries see, without a window and with one of 512;
* **blocks**: blocks of 128 x 128 positions that FlexAttention computes, without a window;
* **targets**: response tokens, which the output heads score.

Also for one pair that fills a row. Files default to `../shared/data/*.jsonl`; pairs are not
truncated, and those longer than a row are left out. `--save` writes to `benchmarks/results/`.
"""

import argparse
from datetime import date

import numpy as np
import torch
from numpy.typing import NDArray
from pair_lengths import Lengths, LengthsOnly, add_arguments, how_counted, lengths_of_files
from result_file import commit, processor, report_result

from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.packing.dealing import block_tokens, deal_positions, keys_seen
from megatron_idpo.data.packing.plan import coarse_trim_tokens
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import pair_tokens
from megatron_idpo.mcore.attention.flex import block_mask
from megatron_idpo.mcore.attention.row_params import ContextShare, RowParams

CONTEXTS = (2, 4, 8)
ROWS_TOKENS = (4096, 32_768)
WINDOW_TOKENS = 512
BATCH_PAIRS = 128
SINGLE_PAIRS = ((32_768, 1024), (131_072, 1024), (131_072, 8192))
"""Tokens of a pair that fills a row, and of each of its answers."""

HEADER = (
    "| rows of | rows | context | shortest blocks | keys | keys, window 512 | blocks | targets |\n"
    + "|---" * 8
    + "|"
)


def imbalance(row: Row, ranks: int) -> tuple[float, float, float, float]:
    """Fullest rank over the mean: keys, keys in the window, blocks of the kernel, targets."""
    row_tokens = len(row.tokens_T)
    positions_RL = deal_positions(row.spans_G4, row_tokens, ranks)
    keys_T = keys_seen(row.spans_G4, row_tokens)
    targets_T = np.bincount(row.target_positions_N, minlength=row_tokens)
    spans_G4, position_ids_T = map(torch.from_numpy, (row.spans_G4, row.position_ids_T))
    blocks_R = np.empty(ranks)
    for rank in range(ranks):
        share = ContextShare.of(positions_RL, rank)
        mask = block_mask(RowParams.of(position_ids_T, spans_G4, 0.0, share), None)
        assert mask.full_kv_num_blocks is not None
        blocks_R[rank] = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    works = (
        keys_T[positions_RL].sum(1),
        np.minimum(keys_T, WINDOW_TOKENS)[positions_RL].sum(1),
        blocks_R,
        targets_T[positions_RL].sum(1),
    )
    return tuple(_fullest_over_mean(work_R) for work_R in works)  # type: ignore[return-value]


def _fullest_over_mean(work_R: NDArray[np.float64] | NDArray[np.int64]) -> float:
    return float(work_R.max() / work_R.mean())


def report_rows(name: str, rows: list[Row]) -> list[str]:
    """Lines of the table, one for each number of ranks."""
    lines = []
    for ranks in CONTEXTS:
        worst = np.max([imbalance(row, ranks) for row in rows], axis=0)
        shortest = min(block_tokens(len(row.tokens_T) // ranks) for row in rows)
        cells = " | ".join(f"{value:.3f}" for value in worst)
        lines.append(f"| {name} | {len(rows)} | {ranks} | {shortest} | {cells} |")
    return lines


def rows_of(lengths_P3: Lengths, row_tokens: int) -> list[Row]:
    """The rows of one epoch."""
    kept_P3 = lengths_P3[pair_tokens(lengths_P3, share_prompt=True) <= row_tokens]
    settings = RowSettings(
        row_tokens=row_tokens, pad_token=0, trim_tokens=coarse_trim_tokens(row_tokens, 128)
    )
    batches = TrainingBatches(
        LengthsOnly(kept_P3), settings, global_batch_pairs=min(BATCH_PAIRS, len(kept_P3)), seed=0
    )
    return [row for batch in batches for row in batch.rows if len(row.spans_G4)]


def main() -> None:
    """Measure and print; save on request."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    options = parser.parse_args()
    lines = [
        "# Balance of context-parallel ranks",
        "",
        f"`benchmarks/balance.py`, {date.today()}, commit {commit()}, {processor()}; tokens: "
        f"{how_counted(options)}. Fullest rank over the mean, largest value of any row. The script "
        "describes the columns.",
        "",
        "## One pair that fills the row",
        "",
        HEADER,
    ]
    for row_tokens, answer in SINGLE_PAIRS:
        pair = LengthsOnly(np.array([[row_tokens - 2 * answer, answer, answer]], np.int32))[0]
        name = f"{row_tokens:,}, answers of {answer:,}"
        lines += report_rows(name, [Row.build([pair], row_tokens, 0)])
    for name, lengths_P3 in lengths_of_files(options):
        medians = "/".join(str(int(median)) for median in np.median(lengths_P3, axis=0))
        lines += ["", f"## {name}: {len(lengths_P3):,} pairs, median {medians}", "", HEADER]
        for row_tokens in ROWS_TOKENS:
            lines += report_rows(f"{row_tokens:,}", rows_of(lengths_P3, row_tokens))
    report_result("balance", "\n".join(lines), save=options.save)


if __name__ == "__main__":
    main()

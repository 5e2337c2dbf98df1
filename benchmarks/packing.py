"""Packed rows: fill, savings against padded batches, and speed of building them.

    python benchmarks/packing.py --tokenizer DIR       token counts of a Hugging Face tokenizer
    python benchmarks/packing.py --synthetic-lengths   one token per 4 bytes instead

Prints, for every given preference file (default: `../shared/data/*.jsonl`, or random lengths if
there are none):

* **fill**: tokens of all trained pairs / positions of all rows, including empty rows and padding,
  over one epoch of full global batches in seeded order: with rows of equal length, with rows cut to
  a multiple of `--trim-tokens`, and with cut rows without shared prompts;
* **possible**: an upper bound. No plan has rows shorter than the longest pair, or than the tokens
  divided by the number of rows, rounded up; the best number of rows in every step;
* **of TRL**: positions per pair / those of TRL's padded batches of 4 pairs with the same tokens in
  the same order: 8 sequences, each as long as the longest (its collator stacks all chosen and all
  rejected, padded on the right);
* **slowest rank**: its mean cost above that of the mean rank, in tokens and attention;
* **pairs/s**: pairs planned and built into rows per second of CPU time, summed over threads.

Then it streams a million random pairs and prints the memory in use. Pairs are truncated as in TRL
(`keep_start`; pairs whose prompt alone is too long are dropped). `--save` also writes the output to
`benchmarks/results/`.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from pair_lengths import Lengths, LengthsOnly, add_arguments, how_counted, lengths_of_files
from result_file import processor, report_result

from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.packing.plan import VISITS_PER_TOKEN, attention_visits, plan_rows
from megatron_idpo.data.pairs import pair_tokens, stream_pairs

TRL_BATCH_PAIRS = 4
REQUIRED_FILL = 0.97
BATCHES_PAIRS = (32, 64, 128, 256, 512)
DATA_SIZES = (1, 8)
RANDOM_MEDIANS = {"random, short": (122, 29, 37), "random, long prompts": (713, 101, 97)}


def made_up_lengths(num_pairs: int, medians: tuple[int, int, int]) -> Lengths:
    """Log-normal lengths around `medians`, with about the spread of the real files."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(np.log(medians), 0.6, (num_pairs, 3))
    return np.clip(drawn, 1, 1024).astype(np.int32)


def truncate(lengths_P3: Lengths, max_length: int) -> Lengths:
    """TRL's `keep_start`: truncates answers; drops pairs whose prompt alone is too long."""
    kept_P3 = lengths_P3[lengths_P3[:, 0] < max_length].copy()
    kept_P3[:, 1:] = np.minimum(kept_P3[:, 1:], max_length - kept_P3[:, :1])
    return kept_P3


def trl_positions_per_pair(lengths_P3: Lengths) -> float:
    """Positions that TRL's padded batches of `TRL_BATCH_PAIRS` compute, per pair."""
    whole = len(lengths_P3) // TRL_BATCH_PAIRS * TRL_BATCH_PAIRS
    order_P = stream_pairs(0, whole, num_pairs=len(lengths_P3), seed=0)
    longest_P = (lengths_P3[:, 0] + lengths_P3[:, 1:].max(axis=1))[order_P]
    return float(2 * longest_P.reshape(-1, TRL_BATCH_PAIRS).max(axis=1).mean())


def measure(lengths_P3: Lengths, settings: RowSettings, pairs: int) -> tuple[float, float, float]:
    """(fill, positions per pair, pairs per CPU second) of one epoch in batches of `pairs`."""
    used = computed = trained = 0
    batches = TrainingBatches(LengthsOnly(lengths_P3), settings, global_batch_pairs=pairs, seed=0)
    begin_s = time.process_time()
    for batch in batches:
        used += batch.used_tokens
        computed += batch.computed_tokens
        trained += batch.num_pairs
    spent_s = time.process_time() - begin_s
    return used / computed, computed / trained, trained / spent_s


def steps(lengths_P3: Lengths, pairs: int) -> Iterator[Lengths]:
    """The lengths [B, 3] of the global batches that `measure` trains on."""
    for first in range(0, len(lengths_P3) - pairs + 1, pairs):
        yield lengths_P3[stream_pairs(first, pairs, num_pairs=len(lengths_P3), seed=0)]


def possible_fill(
    lengths_P3: Lengths, pairs: int, *, row_tokens: int, trim_tokens: int, ranks: int
) -> float:
    """Upper bound of the fill of any plan."""
    used = computed = 0
    for lengths_B3 in steps(lengths_P3, pairs):
        tokens_B = pair_tokens(lengths_B3, share_prompt=True)
        total, longest = int(tokens_B.sum()), int(tokens_B.max())
        used += total
        fewest = ranks * -(-total // (row_tokens * ranks))
        least = fewest * row_tokens
        for rows in range(fewest, max(fewest, pairs) + 1, ranks):
            fullest = max(longest, -(-total // rows))
            least = min(least, rows * -(-fullest // trim_tokens) * trim_tokens)
        computed += least
    return used / computed


def slowest_rank(
    lengths_P3: Lengths, pairs: int, *, row_tokens: int, trim_tokens: int, ranks: int
) -> float:
    """Relative cost of a step's slowest rank above the mean rank."""
    excess = []
    for lengths_B3 in steps(lengths_P3, pairs):
        plan = plan_rows(lengths_B3, row_tokens=row_tokens, trim_tokens=trim_tokens, ranks=ranks)
        visits_B = attention_visits(lengths_B3, share_prompt=True)
        dense = len(plan.pairs[0]) * plan.row_tokens * VISITS_PER_TOKEN
        costs = [dense + sum(int(visits_B[row].sum()) for row in rank) for rank in plan.pairs]
        excess.append(max(costs) / float(np.mean(costs)) - 1)
    return float(np.mean(excess))


def report_file(
    name: str, lengths_P3: Lengths, row_tokens: int, trims_tokens: list[int]
) -> list[str]:
    """The table of one dataset."""
    medians = "/".join(str(int(median)) for median in np.median(lengths_P3, axis=0))
    sharing = (
        pair_tokens(lengths_P3, share_prompt=False).sum()
        / pair_tokens(lengths_P3, share_prompt=True).sum()
    )
    trl = trl_positions_per_pair(lengths_P3)
    heads = ["pairs per global batch", "data ranks", "fill, one length"]
    for trim in trims_tokens:
        heads += [f"fill, cut to {trim}s", "possible", "of TRL"]
    heads += ["fill, prompts twice", "of TRL", "slowest rank", "pairs/s"]
    lines = [
        f"## {name}",
        "",
        f"{len(lengths_P3)} pairs, median {medians} tokens prompt/chosen/rejected; without sharing "
        f"prompts {sharing:.2f} times the tokens; TRL's padded batch of 4: {trl:.0f} positions "
        "per pair",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    below = []
    for ranks in DATA_SIZES:
        for pairs in BATCHES_PAIRS:
            if pairs > len(lengths_P3):
                continue
            cells, fill, possible = report_cell(
                lengths_P3, pairs, ranks, row_tokens=row_tokens, trims_tokens=trims_tokens, trl=trl
            )
            lines.append(f"| {pairs} | {ranks} | {' | '.join(cells)} |")
            if fill < REQUIRED_FILL:
                below.append(f"{pairs} pairs on {ranks}: {fill:.1%} of at most {possible:.1%}")
    message = "; ".join(below) or "none"
    return [*lines, "", f"Below {REQUIRED_FILL:.0%} when cut to {trims_tokens[0]}s: {message}.", ""]


def report_cell(
    lengths_P3: Lengths,
    pairs: int,
    ranks: int,
    *,
    row_tokens: int,
    trims_tokens: list[int],
    trl: float,
) -> tuple[list[str], float, float]:
    """The cells of one line, and fill and possible fill at the first of `trims_tokens`."""
    first_trim = trims_tokens[0]
    cut = RowSettings(row_tokens=row_tokens, pad_token=0, data_size=ranks, trim_tokens=first_trim)
    cells = [f"{measure(lengths_P3, replace(cut, trim_tokens=0), pairs)[0]:.1%}"]
    fills, possibles, speeds = [], [], []
    for trim in trims_tokens:
        fill, positions, speed = measure(lengths_P3, replace(cut, trim_tokens=trim), pairs)
        possible = possible_fill(
            lengths_P3, pairs, row_tokens=row_tokens, trim_tokens=trim, ranks=ranks
        )
        cells += [f"{fill:.1%}", f"{possible:.1%}", f"{positions / trl:.2f}"]
        fills.append(fill)
        possibles.append(possible)
        speeds.append(speed)
    fill, positions, _ = measure(lengths_P3, replace(cut, share_prompt=False), pairs)
    cells += [f"{fill:.1%}", f"{positions / trl:.2f}"]
    if ranks > 1:
        excess = slowest_rank(
            lengths_P3, pairs, row_tokens=row_tokens, trim_tokens=first_trim, ranks=ranks
        )
        # Data rank 0 builds only its own rows, so its rate is not that of the whole job.
        cells += [f"+{excess:.2%}", ""]
    else:
        cells += ["", f"{speeds[0]:,.0f}"]
    return cells, fills[0], possibles[0]


def report_stream(num_pairs: int, row_tokens: int) -> list[str]:
    """Memory in use while streaming `num_pairs` random pairs."""
    process = psutil.Process()
    lengths_P3 = made_up_lengths(num_pairs, (122, 29, 37))
    settings = RowSettings(row_tokens=row_tokens, pad_token=0)
    batches = TrainingBatches(LengthsOnly(lengths_P3), settings, global_batch_pairs=500, seed=0)
    begin_s = time.process_time()
    marks = []
    for batch in batches:
        if batch.consumed_pairs % (num_pairs // 10) < batch.num_pairs:
            marks.append(f"{process.memory_info().rss / 2**20:.1f}")
    rate = num_pairs / (time.process_time() - begin_s)
    return [
        f"## {num_pairs:,} random pairs streamed",
        "",
        f"resident MiB after each tenth: {', '.join(marks)} "
        f"(of these {lengths_P3.nbytes / 2**20:.1f} are the lengths); {rate:,.0f} pairs/s",
        "",
    ]


def command() -> str:
    """The command line of this run, with paths reduced to names."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/packing.py", *words])


def main() -> None:
    """Measure and print; save on request."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--trim-tokens", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--stream-pairs", type=int, default=1_000_000)
    options = parser.parse_args()

    lines = [
        "# Packing",
        "",
        f"    {command()}",
        "",
        f"{date.today()}, {processor()}; tokens: {how_counted(options)}; rows of at most "
        f"{options.row_tokens}, max_length {options.max_length}. The script describes the columns.",
        "",
    ]
    files = list(lengths_of_files(options))
    for name, lengths_P3 in files:
        kept_P3 = truncate(lengths_P3, options.max_length)
        lines += report_file(name, kept_P3, options.row_tokens, options.trim_tokens)
    if not files:
        for name, medians in RANDOM_MEDIANS.items():
            kept_P3 = truncate(made_up_lengths(4000, medians), options.max_length)
            lines += report_file(name, kept_P3, options.row_tokens, options.trim_tokens)
    if options.stream_pairs:
        lines += report_stream(options.stream_pairs, options.row_tokens)
    report_result("packing", "\n".join(lines), save=options.save)


if __name__ == "__main__":
    main()

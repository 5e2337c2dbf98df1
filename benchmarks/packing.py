"""How full packed rows are, what they save against padded batches, and how fast they are built.

    python benchmarks/packing.py --tokenizer DIR       token counts of a Hugging Face tokenizer
    python benchmarks/packing.py --synthetic-lengths   a token for every 4 bytes instead

Prints, for every preference file given (`../shared/data/*.jsonl` by default; made-up lengths if
there is none):

* **fill**: tokens in all pairs trained on / positions in all rows computed, empty rows and padding
  included, over one epoch of full global batches in seeded order;
* **of TRL**: positions computed per pair / those of TRL's padded batches of 4 pairs on the same
  tokens in the same order: 8 sequences, each as long as the longest (its collator stacks all chosen
  and all rejected, padded on the right);
* **pairs/s**: pairs planned and built into rows per second of CPU time, all threads added up.

Then it streams a million made-up pairs and prints the memory in use on the way.
Pairs are cut as TRL cuts them (`keep_start`, prompts that leave no room dropped).
`--save` also writes what is printed to `benchmarks/results/`.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from megatron_idpo.data.batches import RowSettings, TrainingBatches
from megatron_idpo.data.order import stream_pairs
from megatron_idpo.data.pair import Pair
from megatron_idpo.data.rows import occupied_tokens

ROOT = Path(__file__).resolve().parent.parent
TRL_BATCH_PAIRS = 4
BYTES_PER_TOKEN = 4
TEMPLATE_TOKENS = 4  # What a chat template adds to a message, about.
MADE_UP_MEDIANS = {"made up, short": (122, 29, 37), "made up, long prompts": (713, 101, 97)}
Lengths = NDArray[np.int32]


class LengthsOnly:
    """Pairs of given lengths, all of one token: packing does not look at tokens."""

    def __init__(self, lengths_P3: Lengths) -> None:
        """Args: prompt, chosen and rejected lengths, int [P, 3]."""
        self.lengths_P3 = lengths_P3

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.lengths_P3)

    def __getitem__(self, index: int, /) -> Pair:
        """A pair with freshly made tokens, so that making them is timed too."""
        prompt, chosen, rejected = self.lengths_P3[index]
        return Pair(
            index,
            np.full(prompt, 7, np.int32),
            np.full(chosen, 7, np.int32),
            np.full(rejected, 7, np.int32),
        )


def tokenized_lengths(path: Path, tokenizer_path: str) -> Lengths:
    """Prompt, chosen and rejected tokens of every record of a chat preference file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    if not tokenizer.chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
    texts: list[str] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, tokenize=False
        )
        texts.append(prompt)
        for answer in (record["chosen"], record["rejected"]):
            whole = tokenizer.apply_chat_template(record["prompt"] + answer, tokenize=False)
            texts.append(whole[len(prompt) :])
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return np.array(counts, np.int32).reshape(-1, 3)


def estimated_lengths(path: Path) -> Lengths:
    """The same at `BYTES_PER_TOKEN`, with `TEMPLATE_TOKENS` for every message."""

    def tokens(messages: list[dict[str, str]]) -> int:
        num_bytes = sum(len(message["content"].encode()) for message in messages)
        return -(-num_bytes // BYTES_PER_TOKEN) + TEMPLATE_TOKENS * len(messages)

    records = [json.loads(line) for line in path.read_text().splitlines()]
    fields = ("prompt", "chosen", "rejected")
    return np.array([[tokens(record[field]) for field in fields] for record in records], np.int32)


def made_up_lengths(num_pairs: int, medians: tuple[int, int, int]) -> Lengths:
    """Log-normal lengths around `medians`, with about the spread of the real files."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(np.log(medians), 0.6, (num_pairs, 3))
    return np.clip(drawn, 1, 1024).astype(np.int32)


def truncate(lengths_P3: Lengths, max_length: int) -> Lengths:
    """TRL's `keep_start`: prompts that leave no room are dropped, answers lose their ends."""
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


def report_file(name: str, lengths_P3: Lengths, row_tokens: int, trim_tokens: int) -> list[str]:
    """The table of one dataset."""
    medians = "/".join(str(int(median)) for median in np.median(lengths_P3, axis=0))
    sharing = (
        occupied_tokens(lengths_P3, share_prompt=False).sum()
        / occupied_tokens(lengths_P3, share_prompt=True).sum()
    )
    trl = trl_positions_per_pair(lengths_P3)
    lines = [
        f"## {name}",
        "",
        f"{len(lengths_P3)} pairs, median {medians} tokens prompt/chosen/rejected; without sharing "
        f"prompts {sharing:.2f} times the tokens; TRL's padded batch of 4: {trl:.0f} positions "
        "per pair",
        "",
        f"| pairs per global batch | data ranks | fill | of TRL | fill, rows cut to {trim_tokens}s "
        "| of TRL | fill, prompts twice | of TRL | pairs/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for data_size in (1, 8):
        for pairs in (32, 64, 128, 256, 512):
            if pairs > len(lengths_P3):
                continue
            plain = RowSettings(row_tokens=row_tokens, pad_token=0, data_size=data_size)
            trimmed = RowSettings(
                row_tokens=row_tokens,
                pad_token=0,
                data_size=data_size,
                trim_tokens=trim_tokens,
            )
            twice = RowSettings(
                row_tokens=row_tokens, pad_token=0, data_size=data_size, share_prompt=False
            )
            fill, positions, speed = measure(lengths_P3, plain, pairs)
            cut_fill, cut_positions, _ = measure(lengths_P3, trimmed, pairs)
            twice_fill, twice_positions, _ = measure(lengths_P3, twice, pairs)
            # Data rank 0 builds its own rows only: as a rate of the whole job it would flatter.
            rate = f"{speed:,.0f}" if data_size == 1 else ""
            lines.append(
                f"| {pairs} | {data_size} | {fill:.1%} | {positions / trl:.2f} | {cut_fill:.1%} "
                f"| {cut_positions / trl:.2f} | {twice_fill:.1%} | {twice_positions / trl:.2f} "
                f"| {rate} |"
            )
    return [*lines, ""]


def report_stream(num_pairs: int, row_tokens: int) -> list[str]:
    """Memory in use while `num_pairs` made-up pairs pass through."""
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
        f"## {num_pairs:,} made-up pairs streamed",
        "",
        f"resident MiB after each tenth: {', '.join(marks)} "
        f"(of these {lengths_P3.nbytes / 2**20:.1f} are the lengths); {rate:,.0f} pairs/s",
        "",
    ]


def processor() -> str:
    """The processor's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="chat preference files (jsonl)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", help="directory or hub name of a tokenizer")
    kind.add_argument("--synthetic-lengths", action="store_true", help="a token for 4 bytes")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--trim-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--stream-pairs", type=int, default=1_000_000)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    options = parser.parse_args()

    counted = "a token for 4 bytes" if options.synthetic_lengths else Path(options.tokenizer).name
    lines = [
        "# Packing",
        "",
        f"{date.today()}, {processor()}; tokens: {counted}; rows of {options.row_tokens}, "
        f"max_length {options.max_length}.",
        "",
    ]
    files = options.files or sorted((ROOT.parent / "shared" / "data").glob("*.jsonl"))
    for path in files:
        lengths_P3 = (
            estimated_lengths(path)
            if options.synthetic_lengths
            else tokenized_lengths(path, options.tokenizer)
        )
        kept_P3 = truncate(lengths_P3, options.max_length)
        lines += report_file(path.stem, kept_P3, options.row_tokens, options.trim_tokens)
    if not files:
        for name, medians in MADE_UP_MEDIANS.items():
            kept_P3 = truncate(made_up_lengths(4000, medians), options.max_length)
            lines += report_file(name, kept_P3, options.row_tokens, options.trim_tokens)
    if options.stream_pairs:
        lines += report_stream(options.stream_pairs, options.row_tokens)
    text = "\n".join(lines)
    print(text)
    if options.save:
        hardware = "-".join("".join(c if c.isalnum() else " " for c in processor()).split())
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        (results / f"packing_{date.today()}_{hardware}.md").write_text(text)


if __name__ == "__main__":
    main()

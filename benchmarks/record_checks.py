"""What it costs to find out what of a record would be altered (docs/decisions.md).

    python benchmarks/record_checks.py --tokenizer DIR [FILE ...] [--rounds 5] [--save]

Tokenizes every record of the given preference files (default: `../shared/data/*.jsonl`) as `data`
does, in one process, with and without the checks that only find something out: notes about fields
and repeated prompts, control tokens in text, what the chat template leaves out or encodes twice,
answers without text. Both alternate; the table has medians of the CPU time of all threads, which
other load on the machine affects less than wall time, and what a run without them would save.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from itertools import batched
from pathlib import Path
from typing import Any
from unittest.mock import patch

from result_file import ROOT, commit, processor, report_result

from megatron_idpo.data.sources import preferences
from megatron_idpo.data.sources.readers import RawRow, read_file
from megatron_idpo.data.tokenize import chat, rendering
from megatron_idpo.data.tokenize.build_store import tokenize_rows
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer

BATCH_ROWS = 512

CHECKS: tuple[tuple[Any, str, Any], ...] = (
    (preferences, "pair_notes", lambda *_: {}),
    (preferences, "check_prompt_name", lambda *_: None),
    (rendering, "find_control_text", lambda *_: None),
    (rendering, "_find_marks", lambda *_: None),
    (rendering, "fit_tool_arguments", lambda conversations, _: conversations),
    (rendering, "_missing", lambda *_: iter(())),
    (rendering, "_missing_tool", lambda *_: None),
    (chat, "_writes_text", lambda *_: True),
    (chat, "is_unterminated", lambda *_: False),
    (RawRow, "notes", lambda _: {}),
)
"""Module, name, and what takes its place in a run without checks."""


@contextmanager
def without_checks() -> Iterator[None]:
    """Records are read, rendered and encoded, and nothing is looked for."""
    with ExitStack() as stack:
        for owner, name, nothing in CHECKS:
            stack.enter_context(patch.object(owner, name, nothing))
        yield


def tokenize_s(rows: list[RawRow], tokenizer: Tokenizer, options: TokenOptions) -> float:
    """CPU seconds to tokenize all rows."""
    start_s = time.process_time()
    kept = sum(
        tokenize_rows(tokenizer, options, (0, list(batch))).report.kept_pairs
        for batch in batched(rows, BATCH_ROWS)
    )
    assert kept > 0
    return time.process_time() - start_s


def table_row(path: Path, tokenizer: Tokenizer, rounds: int) -> str:
    """One line of the table."""
    rows = list(read_file(path))
    first = rows[0].record()
    assert isinstance(first, dict)
    is_text = isinstance(first["chosen"], str) and isinstance(first.get("prompt"), str)
    options = TokenOptions(max_length=None, format="single_turn" if is_text else "auto")
    taken: dict[bool, list[float]] = {True: [], False: []}
    for index in range(rounds + 1):
        for checked in (True, False) if index % 2 else (False, True):
            with ExitStack() as stack:
                if not checked:
                    stack.enter_context(without_checks())
                seconds = tokenize_s(rows, tokenizer, options)
            if index:  # the first round is warm-up
                taken[checked].append(seconds)
    with_s, without_s = (statistics.median(taken[checked]) for checked in (True, False))
    share = (with_s - without_s) / with_s
    per_10k_s = (with_s - without_s) / len(rows) * 10_000
    return (
        f"| {path.stem} | {len(rows):,} | {with_s:.2f} | {without_s:.2f} "
        f"| {per_10k_s:.2f} | {share:.0%} |"
    )


def main() -> None:
    """Print the report; with `--save` also into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tokenizer", required=True, help="directory, with a chat template")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(options.tokenizer)
    files = options.files or sorted((ROOT.parent / "shared" / "data").glob("*.jsonl"))
    rows = [table_row(file, tokenizer, options.rounds) for file in files]
    load = os.getloadavg()[0]
    text = "\n".join(
        [
            "# What the checks of records cost\n",
            f"{date.today()}, {processor()}, load average {load:.1f}; commit {commit()}; tokenizer "
            f"{Path(options.tokenizer).name}. CPU seconds in one process, medians of "
            f"{options.rounds}. What is measured stands in `benchmarks/record_checks.py`.\n",
            "| file | records | with, s | without, s | s per 10,000 records | of the time |\n"
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    report_result("record-checks", text, save=options.save)


if __name__ == "__main__":
    main()

"""`megatron-idpo data CONFIG.yaml`: what the preference data becomes, before anything is trained.

Prints three pairs as they will be trained, statistics of all pairs and of their rows, and the
number of truncated, dropped and skipped rows, and saves a figure (`data.png` in `training.output`,
the last line printed). Training opens the tokenized pairs from the cache. Of the model only the
tokenizer is loaded.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.inspect.sample_pairs import PART_STYLES, print_pair, select_pairs
from megatron_idpo.data.inspect.statistics import (
    Quantiles,
    RowStatistics,
    length_quantiles,
    plan_sampled_steps,
    sharing_gain,
)
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.pairs import IntArray
from megatron_idpo.data.run_pairs import RunPairs, load_run_pairs, row_settings

FIGURE = "data.png"


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Run the verb. Under torchrun only the first process does something.

    `WORLD_SIZE` is the number of processes of the planned training (torchrun sets it; set it by
    hand to plan for another number): all beyond one model replica become data-parallel ranks.

    Raises:
        ConfigError, DataError: the configuration or the data is invalid.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    config = load_config(
        config_path, overrides, required=("model", "data", "training"), optional=("layout",)
    )
    # The terminal's encoding may lack characters of the data.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    inspect_data(config, Console(highlight=False))
    return 0


def inspect_data(config: RunConfig, console: Console) -> None:
    """Print the pairs and their statistics, and save the figure.

    Raises:
        ConfigError, DataError: see `main`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", config.layout.min_ranks))
    config.layout.check(None, world_size)
    settings = row_settings(config, world_size)
    with console.status("reading and tokenizing (cached for the next run)"):
        run_pairs = load_run_pairs(config)
    pairs = run_pairs.train
    rows = plan_sampled_steps(
        pairs,
        settings,
        global_batch_pairs=config.training.global_batch_pairs,
        seed=config.data.seed,
        epochs=config.training.epochs,
    )
    share_prompt = config.data.share_prompt
    max_length = config.data.max_length if run_pairs.train_report.truncated_pairs else None
    tokenizer = run_pairs.tokenizer
    selected = select_pairs(pairs, max_length, tokenizer, share_prompt=share_prompt)
    for index, reason in selected.items():
        print_pair(console, pairs, index, max_length, tokenizer, title=reason)
    _print_sources(console, run_pairs)
    _print_lengths(console, pairs.lengths_P3, share_prompt=share_prompt)
    _print_rows(console, config, settings, rows, sharing_gain(pairs.lengths_P3))
    # Imported here: matplotlib takes as long to import as all the rest.
    from megatron_idpo.figures.data_lengths import draw_data_lengths

    path = Path(config.training.output) / FIGURE
    name = ", ".join(Path(source).name for source in pairs.source_names)
    title = f"{name}: {len(pairs):,} pairs"
    draw_data_lengths(path, pairs.lengths_P3, rows.fill_R, rows.fill, title=title)
    console.print(Text(f"figure  {path}"), soft_wrap=True)


def _print_sources(console: Console, run_pairs: RunPairs) -> None:
    """How many rows of the sources became pairs, and why the others did not."""
    train = run_pairs.train
    lines = [("train", line) for line in run_pairs.train_report.lines()]
    names = train.source_names
    if len(names) > 1:
        counts = np.bincount(train.source_P, minlength=len(names)).tolist()
        lines += [
            ("", f"{count:,} pairs per epoch from {name}")
            for count, name in zip(counts, names, strict=True)
        ]
    if run_pairs.eval_report is not None:
        lines += [("eval", line) for line in run_pairs.eval_report.lines()]
    elif run_pairs.eval is not None:
        lines.append(("eval", f"{len(run_pairs.eval):,} pairs held out of train"))
    _print_lines(console, "Pairs", lines)


def _print_lengths(console: Console, lengths_P3: IntArray, *, share_prompt: bool) -> None:
    """A table of lengths in tokens."""
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="dim")
    table.title = Text("Tokens", style="bold")
    table.add_column("")
    for heading in ("median", "p90", "max"):
        table.add_column(heading, justify="right", min_width=7)
    for name, quantiles in length_quantiles(lengths_P3, share_prompt=share_prompt).items():
        label = name if name != "pair" else f"pair, prompt {'once' if share_prompt else 'twice'}"
        values = (quantiles.median, quantiles.p90, quantiles.max)
        table.add_row(Text(label, PART_STYLES.get(name, "")), *(f"{value:,}" for value in values))
    console.print(table, "")


def _print_rows(
    console: Console, config: RunConfig, settings: RowSettings, rows: RowStatistics, gain: float
) -> None:
    """Steps of the run, and the size and fill of their rows."""
    epochs = config.training.epochs
    steps = f"{rows.steps:,} of {config.training.global_batch_pairs:,} pairs in {epochs:,} epoch"
    steps += "s" if epochs > 1 else ""
    if rows.dropped_pairs:
        steps += f"; the last {rows.dropped_pairs:,} pairs do not fill a step and are left out"
    ranks = settings.data_size
    per_rank = f" on each of {ranks:,} data-parallel ranks" if ranks > 1 else ""
    length = f"{_range(rows.length_S)} positions, limit {settings.row_tokens:,}"
    sharing = f"{gain:.2f} × fewer positions than with every prompt stored twice"
    if not settings.share_prompt:
        sharing = f"off; data.share_prompt would save {gain:.2f} × the positions"
    sampled = len(rows.rows_S)
    measured = "" if sampled == rows.steps else f", measured on {sampled:,} steps"
    lines = [
        ("steps", steps),
        ("rows per step", _range(rows.rows_S) + per_rank),
        ("row length", length),
        ("pairs per row", _range(rows.pairs_R)),
        ("row fill", f"{rows.fill:.1%} of the computed positions hold a token"),
        ("prompt sharing", sharing),
    ]
    _print_lines(console, f"Rows, median (min to max){measured}", lines)


def _range(values: IntArray) -> str:
    quantiles = Quantiles.of(values)
    if quantiles.min == quantiles.max:
        return f"{quantiles.median:,}"
    return f"{quantiles.median:,} ({quantiles.min:,} to {quantiles.max:,})"


def _print_lines(console: Console, title: str, lines: list[tuple[str, str]]) -> None:
    """A titled table of names and values; a repeated name is printed once."""
    table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    table.title = Text(title, style="bold")
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    previous = ""
    for name, value in lines:
        table.add_row("" if name == previous else name, Text(value))
        previous = name
    console.print(table, "")

"""`megatron-idpo data CONFIG.yaml`: what the preference data become, before anything is trained.

Three pairs as they will be trained, the figures of all pairs and of their rows, what was cut,
dropped or skipped, and a picture of it (`data.png` in `training.output`, the last line printed).
What tokenising leaves in the cache is what training opens. No model is loaded: the tokenizer is all
that is read of it.
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

from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.data.inspect.samples import PART_STYLES, Cuts, choose, show_pair
from megatron_idpo.data.inspect.statistics import (
    LengthFigures,
    RowFigures,
    Spread,
    length_figures,
    row_figures,
)
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.run_pairs import RunPairs, load_run_pairs, row_settings
from megatron_idpo.errors import ConfigError

PICTURE = "data.png"


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
    """The verb. Under torchrun the first process looks and the others have nothing to do.

    `WORLD_SIZE` says how many processes are to train (torchrun sets it; set it by hand to ask for
    another number): what is not one model replica's makes data-parallel ranks.

    Raises:
        ConfigError, DataError: the configuration or the data cannot be trained on.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    config = load_config(
        config_path, overrides, required=("model", "data", "training"), optional=("layout",)
    )
    # The data may hold characters that the terminal's encoding has not.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    look(config, Console(highlight=False))
    return 0


def look(config: RunConfig, console: Console) -> None:
    """Prints everything and saves the picture.

    Raises:
        ConfigError, DataError: see `main`.
    """
    settings = row_settings(config, _world_size(config))
    with console.status("reading and tokenising; the next run finds it done"):
        found = load_run_pairs(config)
    pairs = found.train
    rows = row_figures(
        pairs,
        settings,
        global_batch_pairs=config.training.global_batch_pairs,
        seed=config.data.seed,
        epochs=config.training.epochs,
    )
    share_prompt = config.data.share_prompt
    lengths = length_figures(pairs.lengths_P3, share_prompt=share_prompt)
    some_cut = found.train_report.truncated_pairs > 0
    cuts = Cuts.learn(pairs, config.data.max_length if some_cut else None, found.tokenizer)
    for choice in choose(pairs, cuts, share_prompt=share_prompt):
        show_pair(console, pairs, choice, found.tokenizer, cuts)
    show_sources(console, found)
    show_lengths(console, lengths, share_prompt=share_prompt)
    show_rows(console, config, settings, rows, lengths.sharing_gain)
    # Importing matplotlib takes as long as the rest.
    from megatron_idpo.figures.data_lengths import save_picture

    path = Path(config.training.output) / PICTURE
    name = ", ".join(Path(source).name for source in pairs.source_names)
    save_picture(path, pairs.lengths_P3, rows, f"{name}: {len(pairs):,} pairs")
    console.print(Text(str(path)), soft_wrap=True)


def _world_size(config: RunConfig) -> int:
    layout = config.layout.layout()
    world_size = int(os.environ.get("WORLD_SIZE", layout.model_ranks))
    if world_size % layout.model_ranks:
        raise ConfigError.at(
            "layout",
            f"one model takes {layout.model_ranks} processes, WORLD_SIZE is {world_size}",
            f"use a multiple of {layout.model_ranks}",
        )
    return world_size


def show_sources(console: Console, found: RunPairs) -> None:
    """What became of the rows of the sources."""
    message = [("train", line) for line in found.train_report.lines()]
    names, pairs = found.train.source_names, found.train
    if len(names) > 1:
        counts = np.bincount(pairs.source_P, minlength=len(names)).tolist()
        message += [
            ("", f"{count:,} pairs an epoch from {name}")
            for count, name in zip(counts, names, strict=True)
        ]
    if found.eval is not None:
        report = found.eval_report
        lines = report.lines() if report else [f"{len(found.eval):,} pairs held out of train"]
        message += [("eval", line) for line in lines]
    _print_facts(console, "Pairs", message)


def show_lengths(console: Console, lengths: LengthFigures, *, share_prompt: bool) -> None:
    """A table of lengths in tokens."""
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="dim")
    table.title = Text("Tokens", style="bold")
    table.add_column("")
    for heading in ("median", "p90", "max"):
        table.add_column(heading, justify="right", min_width=7)
    for name, spread in lengths.parts.items():
        message = name if name != "pair" else f"pair, prompt {'once' if share_prompt else 'twice'}"
        values = (spread.median, spread.p90, spread.highest)
        table.add_row(Text(message, PART_STYLES.get(name, "")), *(f"{value:,}" for value in values))
    console.print(table, "")


def show_rows(
    console: Console, config: RunConfig, settings: RowSettings, rows: RowFigures, gain: float
) -> None:
    """The run in steps, and the steps in rows."""
    training = config.training
    epochs = "1 epoch" if training.epochs == 1 else f"{training.epochs:,} epochs"
    steps = f"{rows.steps:,} of {training.global_batch_pairs:,} pairs in {epochs}"
    if rows.left_over_pairs:
        steps += f"; the last {rows.left_over_pairs:,} pairs fill none and are left out"
    ranks = settings.data_size
    per_rank = f" on each of {ranks:,} data-parallel ranks" if ranks > 1 else ""
    length = f"{_range(Spread.of(rows.length_S))} positions of at most {settings.row_tokens:,}"
    if settings.share_prompt:
        sharing = f"{gain:.2f} × fewer positions than with every prompt twice"
    else:
        sharing = f"off; data.share_prompt would make it {gain:.2f} × fewer positions"
    sampled = len(rows.rows_S)
    looked_at = "" if sampled == rows.steps else f", measured on {sampled:,} steps"
    message = [
        ("steps", steps),
        ("rows per step", _range(Spread.of(rows.rows_S)) + per_rank),
        ("row length", length),
        ("pairs per row", _range(Spread.of(rows.pairs_R))),
        ("row fill", f"{rows.fill:.1%} of the positions computed hold a token"),
        ("prompt sharing", sharing),
    ]
    _print_facts(console, f"Rows, median (lowest to highest){looked_at}", message)


def _range(spread: Spread) -> str:
    if spread.lowest == spread.highest:
        return f"{spread.median:,}"
    return f"{spread.median:,} ({spread.lowest:,} to {spread.highest:,})"


def _print_facts(console: Console, title: str, message: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    table.title = Text(title, style="bold")
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    previous = ""
    for name, words in message:
        table.add_row("" if name == previous else name, Text(words))
        previous = name
    console.print(table, "")

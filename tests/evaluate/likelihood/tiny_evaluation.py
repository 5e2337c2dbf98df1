"""Evaluations of tiny models, shared by the tests of `evaluate/`; the last part runs on workers."""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_idpo.testing import write_tiny_hf_model
from tests.train.tiny_run import SIZES, Files, write_config, write_files

__all__ = ["Models", "evaluation_config", "likelihood", "write_models"]

BATCH_PAIRS = 2
"""Pairs per batch; 12 pairs are several batches."""

BETA = 0.3


@dataclass(frozen=True)
class Models:
    """A reference model, another model of the same architecture, and pairs."""

    files: Files
    other: Path
    pairs: Path
    """Held-out pairs; every prompt occurs twice, with different answers."""


def write_models(root: Path) -> Models:
    """Writes two tiny models with one tokenizer, and pairs that share prompts."""
    files = write_files(root)
    other = root / "other"
    write_tiny_hf_model(other, "llama", seed=7, **SIZES)
    for file in files.model.iterdir():
        if "token" in file.name:
            shutil.copy(file, other / file.name)
    records = [json.loads(line) for line in files.train.read_text().splitlines()]
    for at, record in enumerate(records):
        record["prompt"] = records[at % (len(records) // 2)]["prompt"]
    pairs = root / "pairs.jsonl"
    pairs.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return Models(files, other, pairs)


def evaluation_config(
    models: Models, output: Path, subjects: Mapping[str, Any], **sections: Any
) -> str:
    """Writes the configuration of an evaluation next to its output; returns its path."""
    sections["data"] = {"eval": str(models.pairs), **sections.get("data", {})}
    sections["evaluate"] = {
        "models": subjects,
        "output": str(output),
        "bootstrap_samples": 50,
        **sections.get("evaluate", {}),
    }
    return write_config(
        models.files, output, optimizer=None, reference=None, training=None, **sections
    )


# ---- functions that run on workers ---


def likelihood(
    file: str,
    overrides: Sequence[str] = (),
    *,
    stop_after: int | None = None,
    blind: bool = False,
    figures: bool = False,
) -> tuple[int, str]:
    """On every rank: the verb `likelihood` in small batches; its exit code and output.

    Args:
        file: a configuration.
        overrides: of the configuration.
        stop_after: the last rank is asked to stop after so many pairs.
        blind: loading a model fails.
        figures: draw them, which takes as long as everything else.
    """
    from megatron_idpo.cli.main import console_logging
    from megatron_idpo.evaluate.likelihood.main import main
    from tests.reference.tiny_cache import stopping

    torch.set_num_threads(1)
    with ExitStack() as stack, redirect_stdout(StringIO()) as printed:
        stack.enter_context(patch("megatron_idpo.reference.score.PAIRS_PER_RANK", BATCH_PAIRS))
        stack.enter_context(stopping(stop_after, "held-out pairs"))
        if blind:
            unread = AssertionError("a model is loaded")
            stack.enter_context(
                patch("megatron_idpo.evaluate.likelihood.run.frozen_model", side_effect=unread)
            )
        if not figures:
            stack.enter_context(patch("megatron_idpo.evaluate.likelihood.summary.save_charts"))
        stack.enter_context(console_logging())
        code = main(Path(file), list(overrides))
    return code, printed.getvalue()

"""Evaluations of tiny models: what tests of `evaluate/` share, and what workers run."""

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

from ..train.tiny_run import SIZES, Files, write_config, write_files

__all__ = ["Models", "evaluation_config", "likelihood", "write_models"]

BATCH_PAIRS = 2
"""Pairs of a batch, so that 12 pairs are several."""

BETA = 0.3


@dataclass(frozen=True)
class Models:
    """A reference, another model of its kind, and pairs."""

    files: Files
    other: Path
    pairs: Path
    """Held out: every prompt twice, with other answers."""


def write_models(root: Path) -> Models:
    """Two tiny models with one tokenizer; pairs of which some share their prompt."""
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
    """A configuration of an evaluation, beside its output."""
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


# ---- what workers run ---------------------------------------------------------------------------


def likelihood(
    file: str, overrides: Sequence[str] = (), *, stop_after: int | None = None, blind: bool = False
) -> tuple[int, str]:
    """On every rank: the verb `likelihood` in small batches; its exit code and what it printed.

    Args:
        file: a configuration.
        overrides: of it.
        stop_after: the last rank is asked to stop when so many pairs are done.
        blind: it is a mistake to read a model.
    """
    from megatron_idpo.evaluate.likelihood.main import main

    from ..reference.tiny_cache import stopping

    torch.set_num_threads(1)
    with ExitStack() as stack, redirect_stdout(StringIO()) as printed:
        stack.enter_context(patch("megatron_idpo.reference.score.PAIRS_PER_RANK", BATCH_PAIRS))
        stack.enter_context(stopping(stop_after))
        if blind:
            unread = AssertionError("a model is read again")
            stack.enter_context(
                patch("megatron_idpo.evaluate.likelihood.run.frozen_model", side_effect=unread)
            )
        code = main(Path(file), list(overrides))
    return code, printed.getvalue()

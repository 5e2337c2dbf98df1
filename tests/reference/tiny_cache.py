"""Scoring a tiny model: helpers of the tests of `reference/`, and functions that workers run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.logps_table import Logps

from ..train.tiny_run import Files, write_config, write_files

__all__ = ["Files", "fingerprint", "logps", "score", "score_config", "write_files"]

"""Pairs of a scored batch in `score`: 24 pairs are several batches."""


def fingerprint(*, pairs: int = 10, layers: Sequence[int] = (2, 4), **parts: Any) -> Fingerprint:
    """A fingerprint with invented hashes."""
    hashes = {
        name: hashlib.sha256(name.encode()).hexdigest()
        for name in ("weights", "tokenizer", "chat_template", "data")
    }
    default = Fingerprint(
        **hashes,
        pairs=pairs,
        max_length=96,
        truncation="keep_start",
        layers=tuple(layers),
        norm="final",
        dtype="fp32",
    )
    return replace(default, **parts)


def logps(pairs: int = 10, layers: int = 2, seed: int = 0) -> Logps:
    """Random log-probabilities: float32 [P, L, 2]."""
    random = np.random.default_rng(seed)
    values: NDArray[np.float64] = random.normal(-200, 60, (pairs, layers, 2))
    return values.astype(np.float32)


def score_config(files: Files, output: Path, **sections: Any) -> str:
    """The configuration file of a run with a cache and held-out pairs."""
    sections.setdefault("reference", {"source": "cache"})
    sections["data"] = {"eval": str(files.held_out), **sections.get("data", {})}
    return write_config(files, output, **sections)


# ---- what workers run ---------------------------------------------------------------------------


def score(file: str, overrides: Sequence[str] = (), stop_after: int | None = None) -> Any:
    """On every rank: the verb `score`.

    Args:
        file: a configuration.
        overrides: of it.
        stop_after: the last rank receives a signal when this many pairs are scored.

    Returns:
        The exit code and the output.
    """
    from megatron_idpo.cli.main import console_logging
    from megatron_idpo.cli.train import score as run_score

    torch.set_num_threads(1)
    with redirect_stdout(StringIO()) as printed, console_logging(), stopping(stop_after):
        code = run_score(Path(file), list(overrides))
    return code, printed.getvalue()


@contextmanager
def stopping(pairs: int | None, unit: str = "training pairs") -> Iterator[None]:
    """Send a signal to this process, if it is the last rank, after `pairs` pairs of this unit."""
    import os
    import signal

    import torch.distributed as dist

    from megatron_idpo.console.progress import ProgressTask

    original = ProgressTask.update

    def update(self: ProgressTask, completed: int, **kwargs: Any) -> None:
        original(self, completed, **kwargs)
        is_due = self.unit == unit and completed == pairs
        if is_due and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(ProgressTask, "update", update):
        yield

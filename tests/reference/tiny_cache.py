"""Scoring a tiny model: what tests of `reference/` share, and what workers run."""

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

from megatron_idpo.reference.cache_files import Logps
from megatron_idpo.reference.fingerprint import Fingerprint

from ..train.tiny_run import Files, write_config, write_files

__all__ = ["Files", "fingerprint", "logps", "score", "score_config", "write_files"]

BATCH_PAIRS = 4
"""Pairs of a scored batch in `score`, so that 24 pairs are several."""


def fingerprint(*, pairs: int = 10, layers: Sequence[int] = (2, 4), **parts: Any) -> Fingerprint:
    """A cache's, of hashes made up."""
    made_up = {
        name: hashlib.sha256(name.encode()).hexdigest()
        for name in ("weights", "tokenizer", "chat_template", "data")
    }
    plain = Fingerprint(
        **made_up,
        pairs=pairs,
        max_length=96,
        truncation="keep_start",
        layers=tuple(layers),
        norm="final",
        dtype="fp32",
    )
    return replace(plain, **parts)


def logps(pairs: int = 10, layers: int = 2, seed: int = 0) -> Logps:
    """Numbers like log-probabilities: float32 [P, L, 2]."""
    random = np.random.default_rng(seed)
    values: NDArray[np.float64] = random.normal(-200, 60, (pairs, layers, 2))
    return values.astype(np.float32)


def score_config(files: Files, output: Path, **sections: Any) -> str:
    """A configuration of a run with a cache and held-out pairs."""
    sections.setdefault("reference", {"source": "cache"})
    sections["data"] = {"eval": str(files.held_out), **sections.get("data", {})}
    return write_config(files, output, **sections)


# ---- what workers run ---------------------------------------------------------------------------


def score(file: str, overrides: Sequence[str] = (), stop_after: int | None = None) -> Any:
    """On every rank: the verb `score` in small batches.

    Args:
        file: a configuration.
        overrides: of it.
        stop_after: the last rank is asked to stop when so many pairs are done.

    Returns:
        The exit code and what was printed.
    """
    from megatron_idpo.reference.main import main

    torch.set_num_threads(1)
    with redirect_stdout(StringIO()) as printed, _small_batches(), stopping(stop_after):
        code = main(Path(file), list(overrides))
    return code, printed.getvalue()


@contextmanager
def _small_batches() -> Iterator[None]:
    with patch("megatron_idpo.reference.score.PAIRS_PER_RANK", BATCH_PAIRS):
        yield


@contextmanager
def stopping(pairs: int | None) -> Iterator[None]:
    """A signal to this process, if it is the last rank, when so many pairs are done."""
    import os
    import signal

    import torch.distributed as dist

    from megatron_idpo.reference.score_progress import ScoreProgress

    ordinary = ScoreProgress.update

    def update(self: ScoreProgress, done: int) -> None:
        ordinary(self, done)
        if done == pairs and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(ScoreProgress, "update", update):
        yield

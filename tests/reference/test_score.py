"""Scoring: what Transformers says of every pair at every layer, in every layout, after any end."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_idpo.data.sources.open import Source
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, DataError
from megatron_idpo.reference.cache_files import read_table

from ..train.tiny_run import HELD_OUT, NUM_LAYERS, PAIRS
from .tiny_cache import BATCH_PAIRS, Files, score, score_config

ALL = tuple(range(1, NUM_LAYERS + 1))

LAYOUT_TOLERANCE = 2e-5
"""Absolute, of log-probabilities of up to 100: fp32 adds up in another order in each layout."""

TRANSFORMERS_TOLERANCE = 1e-4
"""Issue 6's."""


def tables(output: Path) -> dict[str, NDArray[np.float32]]:
    """What a run's cache has, by its pairs."""
    cache = output / "reference"
    return {
        "train": read_table(cache / "reference.parquet", ALL),
        "eval": read_table(cache / "eval" / "reference.parquet", ALL),
    }


def assert_equal(one: Path, other: Path, tolerance: float) -> None:
    for name, logps_PL2 in tables(one).items():
        np.testing.assert_allclose(logps_PL2, tables(other)[name], rtol=0, atol=tolerance)


def test_it_is_what_transformers_says(scored: Path, tiny: Files, tmp_path: Path) -> None:
    """At the final layer its own log-probabilities; below it, those of norm and head on its hidden
    states."""
    for name, file, pairs in (("train", tiny.train, PAIRS), ("eval", tiny.held_out, HELD_OUT)):
        expected = transformers_logps(tiny.model, file, tmp_path)
        found = tables(scored)[name]
        assert found.shape == expected.shape == (pairs, NUM_LAYERS, 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TRANSFORMERS_TOLERANCE)
        spread = np.abs(np.diff(expected, axis=1)).mean()
        assert spread > 1000 * TRANSFORMERS_TOLERANCE, "layers are to be told apart"


def transformers_logps(model_path: Path, file: Path, cache: Path) -> NDArray[np.float32]:
    """Float32 [P, L, 2], one sequence at a time, unpadded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    pairs = load_pairs(
        [Source(path=str(file))],
        load_tokenizer(str(model_path)),
        TokenOptions(max_length=96),
        cache=cache,
        num_workers=1,
    )
    found = np.zeros((len(pairs), NUM_LAYERS, 2), np.float32)
    for index in range(len(pairs)):
        pair = pairs[index]
        for side, answer in enumerate((pair.chosen_tokens, pair.rejected_tokens)):
            tokens = torch.from_numpy(np.concatenate([pair.prompt_tokens, answer])).long()
            with torch.no_grad():
                hidden = model(tokens[None], output_hidden_states=True).hidden_states
                for layer in ALL:
                    # Transformers' last hidden state has been through the norm.
                    is_normed = layer == NUM_LAYERS
                    normed = hidden[layer] if is_normed else model.model.norm(hidden[layer])
                    logits = model.lm_head(normed)[0, len(pair.prompt_tokens) - 1 : -1]
                    logps = logits.log_softmax(-1)
                    answers = tokens[len(pair.prompt_tokens) :, None]
                    found[index, layer - 1, side] = logps.gather(1, answers).sum()
    return found


LAYOUTS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "TP2": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "TP2-PP2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_makes_the_same_cache(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path, name: str
) -> None:
    processes, layout = LAYOUTS[name]
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"}, layout=layout)
    answers = workers.run(score, processes, file)
    assert [code for code, _ in answers] == [0] * processes
    assert_equal(tmp_path / "run", scored, LAYOUT_TOLERANCE)
    fingerprints = [path / "reference" / "fingerprint.json" for path in (tmp_path / "run", scored)]
    one, other = (path.read_text().splitlines() for path in fingerprints)
    differing = [line for line, same in zip(one, other, strict=True) if line != same]
    assert all("table_sha256" in line for line in differing), "the layout is no part of it"
    assert "24 training pairs and 5 held-out pairs at layers 1, 2, 3, 4" in answers[0][1]
    assert not any(printed for _, printed in answers[1:]), "one rank speaks"


@pytest.mark.distributed
def test_packing_and_prompt_sharing_do_not_matter(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = score_config(
        tiny,
        tmp_path / "run",
        objective={"layers": "all"},
        data={"row_tokens": 192, "share_prompt": False},
    )
    workers.run(score, 1, file)
    assert_equal(tmp_path / "run", scored, LAYOUT_TOLERANCE)


@pytest.mark.distributed
def test_a_signal_to_any_rank_ends_it_saved(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Every rank stops after the next batch, with the exit code of a preempted run."""
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"})
    batch_pairs = 2 * BATCH_PAIRS
    answers = workers.run(score, 2, file, stop_after=batch_pairs)
    assert [code for code, _ in answers] == [EXIT_PREEMPTED] * 2
    assert "the same command goes on" in answers[0][1]
    [part] = (tmp_path / "run" / "reference" / "parts").glob("*.parquet")
    assert len(read_table(part, ALL)) == 2 * batch_pairs
    assert not (tmp_path / "run" / "reference" / "fingerprint.json").exists()
    # In another layout.
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0
    assert f"going on after {2 * batch_pairs} of {PAIRS}" in printed
    assert_equal(tmp_path / "run", scored, LAYOUT_TOLERANCE)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_idpo.reference import main, score, cache_files
score.PAIRS_PER_RANK, score.PART_S = int(sys.argv[2]), 0.0
score.score_pairs.__kwdefaults__["part_s"] = 0.0
from megatron_idpo.reference.run_caches import RunCaches
RunCaches.score.__kwdefaults__["part_s"] = 0.0
ordinary, calls = os.replace, []
def replace(*args):
    calls.append(args)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    ordinary(*args)
cache_files.os.replace = replace
main.main(Path(sys.argv[1]), [])
"""


@pytest.mark.distributed
def test_killed_it_goes_on_and_ends_with_the_same_bits(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """SIGKILL when the third part is about to get its name: two are kept."""
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"})
    command = [sys.executable, "-c", KILLED, file, str(BATCH_PAIRS), "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "run" / "reference" / "parts").glob("part-*.parquet"))) == 2
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0 and f"going on after {2 * BATCH_PAIRS} of {PAIRS}" in printed
    assert_equal(tmp_path / "run", scored, 0.0)


@pytest.mark.distributed
def test_what_is_there_is_not_computed_again(scored: Path, tiny: Files, workers: Any) -> None:
    file = score_config(tiny, scored, objective={"layers": [2]})
    before = (scored / "reference" / "reference.parquet").stat().st_mtime_ns
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0 and "at layers 2, 4" in printed and "scored training" not in printed
    assert (scored / "reference" / "reference.parquet").stat().st_mtime_ns == before


def score_with_nan(file: str) -> str:
    """On every rank: one pair's log-probability is NaN at one layer."""
    from unittest.mock import patch

    from megatron_idpo.reference.live import Resident

    ordinary = Resident.logps

    def spoilt(self: Any, batch: Any) -> Any:
        found = ordinary(self, batch)
        for row, layers in zip(batch.rows, found, strict=True):
            for at, pair in enumerate(row.pair_index_P):
                if pair == 6 and 2 in layers:
                    layers[2][2 * at + 1] = float("nan")
        return found

    with patch.object(Resident, "logps", spoilt):
        try:
            score(file)
        except DataError as error:
            return str(error)
    return "it went through"


@pytest.mark.distributed
def test_a_pair_that_is_no_number_is_named_on_every_rank(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = score_config(tiny, tmp_path / "run", layout={"pipeline": 2}, objective={"layers": "all"})
    for message in workers.run(score_with_nan, 2, file):
        assert "train.jsonl:7" in message
        assert "rejected answer the log-probability nan at layer 2" in message

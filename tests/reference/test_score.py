"""Scoring: equal to Transformers at every layer, in every layout, after stops and kills."""

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

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.cli.train import score as run_score
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.load import load_config
from megatron_idpo.convert.model_source import FrozenModel, open_model
from megatron_idpo.data.packing.batches import EvaluationBatches, TrainingBatches
from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.data.run_pairs import load_run_pairs, row_settings
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, DataError
from megatron_idpo.reference.logps_table import read_table
from megatron_idpo.reference.run_caches import RunCaches

from ..train.tiny_run import BATCH_PAIRS, HELD_OUT, NUM_LAYERS, PAIRS
from .tiny_cache import Files, score, score_config

ALL = tuple(range(1, NUM_LAYERS + 1))

LAYOUT_TOLERANCE = 2e-5
"""Absolute, of log-probabilities of up to 100: each layout sums in another order in fp32."""

TRANSFORMERS_TOLERANCE = 1e-4


def tables(output: Path) -> dict[str, NDArray[np.float32]]:
    """The tables of a run's cache, by set of pairs."""
    cache = output / "reference"
    return {
        "train": read_table(cache / "reference.parquet", ALL),
        "eval": read_table(cache / "eval" / "reference.parquet", ALL),
    }


def assert_equal(first: Path, second: Path, tolerance: float) -> None:
    for name, logps_PL2 in tables(first).items():
        np.testing.assert_allclose(logps_PL2, tables(second)[name], rtol=0, atol=tolerance)


def test_cache_equals_transformers(scored: Path, tiny: Files, tmp_path: Path) -> None:
    """Below the final layer: norm and head applied to Transformers' hidden states."""
    for name, file, pairs in (("train", tiny.train, PAIRS), ("eval", tiny.held_out, HELD_OUT)):
        expected = transformers_logps(tiny.model, file, tmp_path)
        found = tables(scored)[name]
        assert found.shape == expected.shape == (pairs, NUM_LAYERS, 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TRANSFORMERS_TOLERANCE)
        spread = np.abs(np.diff(expected, axis=1)).mean()
        assert spread > 1000 * TRANSFORMERS_TOLERANCE, "layers must be distinguishable"


def transformers_logps(model_path: Path, file: Path, cache: Path) -> NDArray[np.float32]:
    """Float32 [P, L, 2], one sequence at a time, unpadded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    pairs = load_pairs(
        [SourceConfig(path=str(file))],
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
    "CP2": (2, {"context": 2}),
    "CP2-DP2": (4, {"context": 2}),
    "TP2-PP2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        *("TP2", "PP2", "DP2", "CP2"),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("TP2-PP2", "CP2-DP2")),
    ],
)
def test_every_layout_makes_the_same_cache(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path, name: str
) -> None:
    processes, layout = LAYOUTS[name]
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"}, layout=layout)
    ranks = workers.run(score, processes, file)
    assert [code for code, _ in ranks] == [0] * processes
    assert_equal(tmp_path / "run", scored, LAYOUT_TOLERANCE)
    fingerprints = [path / "reference" / "fingerprint.json" for path in (tmp_path / "run", scored)]
    one, other = (path.read_text().splitlines() for path in fingerprints)
    differing = [line for line, same in zip(one, other, strict=True) if line != same]
    assert all("table_checksum" in line or '"sha256"' in line for line in differing), (
        "the layout is not an input"
    )
    assert "24 training pairs and 5 held-out pairs at layers 1, 2, 3, 4" in ranks[0][1]
    assert not any(printed for _, printed in ranks[1:]), "only rank 0 prints"


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
def test_signal_to_any_rank_stops_all_and_saves(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Every rank stops after the next batch with the exit code of a preempted run; it resumes in
    another layout."""
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"})
    ranks = workers.run(score, 2, file, stop_after=BATCH_PAIRS)
    assert [code for code, _ in ranks] == [EXIT_PREEMPTED] * 2
    assert "the same command resumes" in ranks[0][1]
    [part] = (tmp_path / "run" / "reference" / "parts").glob("*.parquet")
    assert len(read_table(part, ALL)) == 2 * BATCH_PAIRS
    assert not (tmp_path / "run" / "reference" / "fingerprint.json").exists()
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0
    assert f"resuming after {2 * BATCH_PAIRS} of {PAIRS} training pairs" in printed
    assert_equal(tmp_path / "run", scored, LAYOUT_TOLERANCE)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_idpo.cli import train
from megatron_idpo.reference import score
score.PART_INTERVAL_S = 0.0
original, calls = os.replace, []
def replace(*args):
    calls.append(args)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)
os.replace = replace
train.score(Path(sys.argv[1]), [])
"""


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_resume_after_sigkill_ends_with_the_same_bits(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """SIGKILL when the third part is about to get its final name: two are kept."""
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"})
    command = [sys.executable, "-c", KILLED, file, "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "run" / "reference" / "parts").glob("part-*.parquet"))) == 2
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0 and f"resuming after {2 * BATCH_PAIRS} of {PAIRS} training pairs" in printed
    assert_equal(tmp_path / "run", scored, 0.0)


@pytest.mark.distributed
def test_resume_in_the_same_layout_ends_with_the_same_bits(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = score_config(tiny, tmp_path / "run", objective={"layers": "all"})
    [(code, _)] = workers.run(score, 1, file, stop_after=BATCH_PAIRS)
    assert code == EXIT_PREEMPTED
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0 and f"resuming after {2 * BATCH_PAIRS} of {PAIRS} training pairs" in printed
    assert_equal(tmp_path / "run", scored, 0.0)


@pytest.mark.parametrize("resumed", [False, True])
def test_pairs_are_scored_in_the_rows_in_which_they_are_read(
    tiny: Files, tmp_path: Path, resumed: bool
) -> None:
    """In bf16 a log-probability depends on the row: the start check is exact only so."""
    config = load_config(score_config(tiny, tmp_path / "run"), required=REQUIRED, optional=OPTIONAL)
    pairs = load_run_pairs(config)
    model = FrozenModel(open_model(config.model.path), "identity")
    train, held_out = RunCaches.of(config, pairs, model).parts
    rows, first = row_settings(config, 1), BATCH_PAIRS if resumed else 0
    order_P = stream_pairs(0, PAIRS, num_pairs=PAIRS, seed=3)[first:]
    read = TrainingBatches(pairs.train, rows, global_batch_pairs=BATCH_PAIRS, seed=3)
    read.load_state_dict({**read.state_dict(), "consumed_pairs": first})
    scored_rows = [row for batch in train.batches(rows, first) for row in batch.rows]
    read_rows = [row for batch in read for row in batch.rows]
    for scored_row, read_row in zip(scored_rows, read_rows, strict=True):
        np.testing.assert_array_equal(scored_row.tokens_T, read_row.tokens_T)
        np.testing.assert_array_equal(order_P[scored_row.pair_index_P], read_row.pair_index_P)
    evaluated = EvaluationBatches(pairs.eval, rows, global_batch_pairs=BATCH_PAIRS)
    (once,), (again,) = list(held_out.batches(rows)), list(evaluated)
    for scored_row, read_row in zip(once.rows, again.rows, strict=True):
        np.testing.assert_array_equal(scored_row.tokens_T, read_row.tokens_T)


@pytest.mark.distributed
def test_complete_cache_is_not_computed_again(scored: Path, tiny: Files, workers: Any) -> None:
    file = score_config(tiny, scored, objective={"layers": [2]})
    before = (scored / "reference" / "reference.parquet").stat().st_mtime_ns
    [(code, printed)] = workers.run(score, 1, file)
    assert code == 0 and "at layers 2, 4" in printed and "log-probs: " not in printed
    assert (scored / "reference" / "reference.parquet").stat().st_mtime_ns == before


def score_with_nan(file: str) -> str:
    """On every rank: the log-probability of the seventh pair is NaN at a layer; the error."""
    from unittest.mock import patch

    from megatron_idpo.reference.sources import Resident

    original = Resident.logps

    def logps_with_nan(self: Any, batch: Any) -> Any:
        by_row = original(self, batch)
        for row, layers in zip(batch.rows, by_row, strict=True):
            for at, pair in enumerate(row.pair_index_P):
                if pair == 6 and 2 in layers:
                    layers[2][2 * at + 1] = float("nan")
        return by_row

    with patch.object(Resident, "logps", logps_with_nan):
        try:
            score(file)
        except DataError as error:
            return str(error)
    return "no error"


@pytest.mark.distributed
def test_nan_is_reported_with_its_pair_on_every_rank(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = score_config(tiny, tmp_path / "run", layout={"pipeline": 2}, objective={"layers": "all"})
    seventh = stream_pairs(6, 1, num_pairs=PAIRS, seed=3)[0]
    for message in workers.run(score_with_nan, 2, file):
        assert f"train.jsonl:{seventh + 1}" in message
        assert "rejected answer the log-probability nan at layer 2" in message


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: t.jsonl}}\n{text}")
    return file


@pytest.mark.parametrize("source", ["resident", "offloaded", "none"])
def test_source_without_cache_is_refused(tmp_path: Path, source: str) -> None:
    file = config(tmp_path, f"reference: {{source: {source}}}")
    with pytest.raises(ConfigError, match=f"reference.source: is {source}, which reads no cache"):
        run_score(file, [])


def test_unused_cache_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path, "reference: {source: resident, cache: x}")
    with pytest.raises(ConfigError, match=r"reference\.cache.*has no effect"):
        run_score(file, [])


def test_section_that_score_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no effect: this verb does not read"):
        run_score(config(tmp_path, ""), ["optimizer.lr=1.0"])

"""Runs with a reference cache learn the same as with a live reference."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, CheckpointError
from megatron_idpo.train.metrics.file import read_metrics

from .run_hooks import stop_after
from .tiny_run import LORA, STEPS, Files, Outcome, run, write_config

LOSS_TOLERANCE = 1e-5
"""Other rows round the reference's log-probabilities differently."""

CACHE = {"reference": {"source": "cache"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "pipeline": (2, {"pipeline": 2}),
    "tensor": (2, {"tensor": 2}),
    "data": (2, {}),
}


def losses(output: Path) -> list[float]:
    """Of every step and of both evaluations."""
    records = read_metrics(output / "metrics.jsonl")
    names = ("eval_loss", "loss")
    return [record[name] for record in records for name in names if name in record]


def config(tiny: Files, output: Path, *, max_steps: int | None = None, **sections: Any) -> str:
    held_out = {"eval": str(tiny.held_out)}
    training = {"export": False, "max_steps": max_steps}
    return write_config(tiny, output, data=held_out, training=training, **sections)


@pytest.fixture(scope="module")
def live(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses of a run with a live reference; each is trained once."""
    known: dict[tuple[str, str], list[float]] = {}

    def train(trained: str, layout: str) -> list[float]:
        if (trained, layout) not in known:
            output = tmp_path_factory.mktemp("live") / "run"
            train_with(tiny, workers, output, trained, layout)
            known[trained, layout] = losses(output)
        return known[trained, layout]

    return train


def train_with(
    tiny: Files, workers: Any, output: Path, trained: str, layout: str, **sections: Any
) -> list[Outcome]:
    """A complete run in a layout."""
    processes, section = LAYOUTS[layout]
    if trained == "lora":
        sections["lora"] = LORA
    file = config(tiny, output, layout=section, **sections)
    outcomes: list[Outcome] = workers.run(run, processes, file)
    assert [outcome.code for outcome in outcomes] == [0] * processes, outcomes[0].printed
    return outcomes


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        ("full", "single"),
        ("lora", "pipeline"),
        pytest.param("full", "pipeline", marks=pytest.mark.exhaustive),
        pytest.param("full", "tensor", marks=pytest.mark.exhaustive),
        pytest.param("lora", "data", marks=pytest.mark.exhaustive),
    ],
)
def test_cache_learns_the_same_as_a_live_reference(
    tiny: Files, workers: Any, tmp_path: Path, live: Any, trained: str, layout: str
) -> None:
    outcomes = train_with(tiny, workers, tmp_path / "run", trained, layout, **CACHE)
    expected = live(trained, layout)
    assert len(expected) == STEPS + 2
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert max(expected) - min(expected) > 0.1, "the loss must change"
    cache = tmp_path / "run" / "reference"
    assert (cache / "reference.parquet").is_file() and (cache / "eval/fingerprint.json").is_file()
    assert "start check passed" in outcomes[0].printed


@pytest.mark.distributed
def test_offloaded_reference_equals_resident(
    tiny: Files, workers: Any, tmp_path: Path, live: Any
) -> None:
    reference = {"source": "offloaded"}
    train_with(tiny, workers, tmp_path / "run", "full", "single", reference=reference)
    assert losses(tmp_path / "run") == live("full", "single")


@pytest.mark.distributed
def test_cache_of_other_layers_is_rejected_before_weights_are_read(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    from .run_hooks import NoWeights

    file = config(tiny, tmp_path / "run", max_steps=2, **CACHE)
    workers.run(run, 1, file)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    file = config(tiny, tmp_path / "run", **CACHE, objective={"layers": [2]})
    with pytest.raises(CheckpointError, match="cache lacks layer 2;"):
        workers.run(run, 1, file, NoWeights())


@pytest.mark.distributed
@pytest.mark.parametrize("trained", [{}, {"lora": LORA}])
def test_deleted_cache_is_computed_again_bitwise_on_resume(
    tiny: Files, workers: Any, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """By the policy at its start: the checkpoint is loaded after that."""
    file = config(tiny, tmp_path / "run", max_steps=3, **CACHE, **trained)
    [stopped] = workers.run(run, 1, file, stop_after(2))
    assert stopped.code == EXIT_PREEMPTED
    cache = tmp_path / "run" / "reference"
    shutil.move(cache / "reference.parquet", tmp_path / "table")
    (cache / "fingerprint.json").unlink()
    [finished] = workers.run(run, 1, file)
    assert finished.code == 0 and "resuming from step 2" in finished.printed
    assert (cache / "reference.parquet").read_bytes() == (tmp_path / "table").read_bytes()


def run_stopped_while_scoring(file: str) -> Outcome:
    """`train`, with a stop signal after the first pairs are scored."""
    import os
    import signal
    from unittest.mock import patch

    from megatron_idpo.console.progress import ProgressTask

    advance = ProgressTask.advance

    def advance_and_signal(self: ProgressTask, count: int = 1, *, status: str = "") -> None:
        advance(self, count, status=status)
        os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(ProgressTask, "advance", advance_and_signal):
        return run(file)


@pytest.mark.distributed
def test_signal_while_scoring_preempts_the_run(tiny: Files, workers: Any, tmp_path: Path) -> None:
    file = config(tiny, tmp_path / "run", max_steps=2, **CACHE)
    [stopped] = workers.run(run_stopped_while_scoring, 1, file)
    assert stopped.code == EXIT_PREEMPTED
    assert "the same command resumes (exit code 75)" in stopped.printed
    assert list((tmp_path / "run" / "reference" / "parts").glob("part-*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    [finished] = workers.run(run, 1, file)
    assert finished.code == 0 and "resuming after" in finished.printed

"""A run that is stopped or killed and started again ends like an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.train.metrics.file import read_metrics
from megatron_idpo.train.metrics.names import EVAL_PAIRS

from .run_hooks import CountSteps, Signal, SignalInEvaluation, stop_after
from .tiny_run import LORA, STEPS, exported, relative_difference, run, write_config

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Between layouts, as in `test_loop.py`."""

DROPOUT = {"lora": {**LORA, "dropout": 0.1}}


@dataclass(frozen=True)
class Case:
    """How a run is trained and stopped."""

    sections: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    number: int = signal.SIGTERM
    rank: int = 0
    """The rank that receives the signal."""


TENSOR = {"layout": {"tensor": 2}}
SEQUENCE = {"layout": {"tensor": 2, "sequence_parallel": True}}
PIPELINE = {"layout": {"pipeline": 2}}
CONTEXT = {"layout": {"context": 2}}

CASES = {"full": Case(), "lora-pipeline": Case({**DROPOUT, **PIPELINE}, 2, signal.SIGUSR1, rank=1)}
MORE_CASES = {
    "lora": Case(DROPOUT),
    "lora-tensor": Case({**DROPOUT, **TENSOR}, 2, rank=1),
    "lora-sequence": Case({**DROPOUT, **SEQUENCE}, 2),
    "lora-data": Case(DROPOUT, 2, rank=1),
    "full-data": Case({}, 2),
    "lora-context": Case({**DROPOUT, **CONTEXT}, 2),
    "full-pipeline-data": Case(PIPELINE, 4, rank=3),
    "bf16": Case({**DROPOUT, "model": {"dtype": "bf16"}}, 1),
}


@pytest.fixture(scope="module")
def uninterrupted(tiny, workers, tmp_path_factory):
    """Outputs of uninterrupted runs; each is trained once and not to be changed."""
    outputs = {}

    def train(processes: int = 1, **sections: Any) -> Path:
        key = repr((processes, sections))
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("whole") / "run"
            workers.run(run, processes, write_config(tiny, outputs[key], **sections))
        return outputs[key]

    return train


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_CASES)]
)
def test_stopped_and_resumed_run_ends_bitwise_equal(tiny, workers, tmp_path, uninterrupted, name):
    """The stopped run also evaluates, which must not change anything."""
    case = {**CASES, **MORE_CASES}[name]
    whole, parts = uninterrupted(case.processes, **case.sections), tmp_path / "parts"
    evaluated = {"data": {"eval": str(tiny.held_out)}, "training": {"eval_every_steps": 3}}
    file = write_config(tiny, parts, **case.sections, **evaluated)

    stop = stop_after(4, rank=case.rank, number=case.number)
    stopped = workers.run(run, case.processes, file, stop, CountSteps())
    assert [outcome.code for outcome in stopped] == [EXIT_PREEMPTED] * case.processes
    assert all(outcome.found["steps"] == [1, 2, 3, 4] for outcome in stopped)
    assert f"exit code {EXIT_PREEMPTED}" in stopped[0].printed
    assert not (parts / "hf").exists()

    resumed = workers.run(run, case.processes, file, CountSteps())
    assert [outcome.code for outcome in resumed] == [0] * case.processes
    assert all(outcome.found["steps"] == [5, 6, 7, 8] for outcome in resumed)
    assert (
        "resuming from step 4: " in resumed[0].printed and "start check" not in resumed[0].printed
    )
    assert weights_bytes(parts) == weights_bytes(whole)
    assert losses(parts) == losses(whole)


def test_complete_run_takes_no_step(tiny, workers, tmp_path):
    short = {"max_steps": 2, "recompute": "auto", "memory_gb": 100.0}
    file = write_config(tiny, tmp_path / "run", data={"eval": str(tiny.held_out)}, training=short)
    (first,) = workers.run(run, 1, file)
    assert "recompute auto: off; planned peak 1." in first.printed
    assert "everything fits without into 100.00 GB" in first.printed
    card = (tmp_path / "run" / "hf" / "README.md").read_text()
    assert "| pairs | 5 |" in card
    before = weights_bytes(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (again,) = workers.run(run, 1, file, CountSteps())
    assert (again.code, again.found["steps"]) == (0, [])
    assert "all 2 steps are complete" in again.printed
    assert "as in the checkpoint; limit 100.00 GB" in again.printed
    after = weights_bytes(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert after == before
    assert (tmp_path / "run" / "hf" / "README.md").read_text() == card


def test_settings_changed_after_the_last_step_have_no_effect_and_are_not_recorded(
    tiny, workers, tmp_path
):
    sections = {"training": {"max_steps": 2}, "optimizer": {"lr": 1e-3, "schedule": "constant"}}
    workers.run(run, 1, write_config(tiny, tmp_path / "run", **sections))
    record = (tmp_path / "run" / "config.yaml").read_text()
    sections["optimizer"] = {"lr": 0.05, "schedule": "constant"}
    (again,) = workers.run(run, 1, write_config(tiny, tmp_path / "run", **sections))
    assert "optimizer.lr was 0.001, is now 0.05" in again.printed
    assert (tmp_path / "run" / "config.yaml").read_text() == record
    assert "learning rate | 0.001" in (tmp_path / "run" / "hf" / "README.md").read_text()


def test_signal_in_the_last_step_does_not_stop_the_run(tiny, workers, tmp_path):
    evaluated = {"data": {"eval": str(tiny.held_out)}, "training": {"max_steps": 2}}
    file = write_config(tiny, tmp_path / "run", **evaluated)
    (outcome,) = workers.run(run, 1, file, Signal(step=1), CountSteps())
    assert (outcome.code, outcome.found["steps"]) == (0, [1, 2])
    assert (tmp_path / "run" / "hf").is_dir()
    assert evaluated_steps(tmp_path / "run") == [0, 2]


def test_stop_does_not_wait_for_an_evaluation_which_the_next_start_makes(tiny, workers, tmp_path):
    """Schedulers kill a run that needs longer than their notice."""
    short = {"global_batch_pairs": 2, "eval_every_steps": 2, "max_steps": 6}
    evaluated = {"data": {"eval": str(tiny.held_out)}, "training": short}
    file = write_config(tiny, tmp_path / "run", **evaluated)
    stops = [
        (SignalInEvaluation(batch=1), [], []),  # of 3, before the first step
        (SignalInEvaluation(batch=4), [1, 2], [0]),  # of the evaluation after step 2
        (stop_after(4), [3, 4], [0, 2]),
    ]
    for hook, steps, evaluations in stops:
        (outcome,) = workers.run(run, 1, file, hook, CountSteps())
        assert (outcome.code, outcome.found["steps"]) == (EXIT_PREEMPTED, steps)
        assert evaluated_steps(tmp_path / "run") == evaluations
    (outcome,) = workers.run(run, 1, file, CountSteps())
    assert (outcome.code, outcome.found["steps"]) == (0, [5, 6])
    assert evaluated_steps(tmp_path / "run") == [0, 2, 4, 6]


def evaluated_steps(output: Path) -> list[int]:
    """Steps after which the held-out pairs were evaluated; each must be logged once."""
    records = [record for record in read_metrics(output / "metrics.jsonl") if EVAL_PAIRS in record]
    assert (output / "metrics.jsonl").read_text().count(f'"{EVAL_PAIRS}"') == len(records)
    return [int(record["step"]) for record in records]


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one": ({}, 1),
    "data": ({}, 2),
    "tensor": ({"tensor": 2}, 2),
    "sequence": ({"tensor": 2, "sequence_parallel": True}, 2),
    "pipeline": ({"pipeline": 2}, 2),
    "pipeline-data": ({"pipeline": 2}, 4),
    "context": ({"context": 2}, 2),
    "context-tensor": ({"context": 2, "tensor": 2}, 4),
}


@pytest.mark.parametrize(
    ("trained", "first", "second"),
    [
        ("full", "pipeline", "sequence"),
        ("full", "context", "one"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                ("full", "one", "pipeline-data"),
                ("full", "data", "one"),
                ("full", "one", "context"),
                ("lora", "context-tensor", "one"),
                ("lora", "pipeline", "context"),
                ("lora", "tensor", "pipeline"),
                ("lora", "pipeline-data", "one"),
            ]
        ),
    ],
)
def test_run_resumes_in_another_layout(
    tiny, workers, tmp_path, uninterrupted, trained, first, second
):
    lora = {"lora": LORA} if trained == "lora" else {}
    whole = uninterrupted(**lora)
    for name, hooks, code in ((first, (stop_after(4),), EXIT_PREEMPTED), (second, (), 0)):
        layout, processes = LAYOUTS[name]
        file = write_config(tiny, tmp_path / "parts", layout=layout, **lora)
        outcomes = workers.run(run, processes, file, *hooks)
        assert [outcome.code for outcome in outcomes] == [code] * processes
    assert losses(tmp_path / "parts") == pytest.approx(losses(whole), abs=TOLERANCE)
    assert relative_difference(exported(tmp_path / "parts"), exported(whole)) <= TOLERANCE


# ---- killed -------------------------------------------------------------------------------------

KILLS = 10
START_S = 300.0
"""A start takes a few seconds; longer on a busy machine."""


@pytest.mark.exhaustive
def test_run_killed_at_random_moments_ends_bitwise_equal(tiny, workers, tmp_path):
    """SIGKILL during steps and during saves; a checkpoint is written after each step."""
    settings = {**DROPOUT, "training": {"epochs": 20}, "checkpoint": {"every_steps": 1}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    workers.run(run, 1, write_config(tiny, whole, **settings), timeout_s=START_S)
    file = write_config(tiny, parts, **settings)
    random = Random(1)
    reached = []
    for _ in range(KILLS):
        assert is_killed_while_training(file, parts / "metrics.jsonl", random)
        saved = (path.name for path in (parts / "checkpoints").glob("step-*"))
        reached.append(max(saved, default=""))
    assert reached == sorted(reached) and len(set(reached)) > 1, reached
    assert finish(file) == 0
    assert weights_bytes(parts) == weights_bytes(whole)
    assert losses(parts) == losses(whole)


def is_killed_while_training(file: str, metrics: Path, random: Random) -> bool:
    """Start the run in a process and kill it shortly after its first few steps."""
    written = metrics.stat().st_mtime_ns if metrics.exists() else None
    logged, target = None, random.randint(1, 5)
    with start(file) as program:
        deadline = time.monotonic() + START_S
        while program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if not metrics.exists() or metrics.stat().st_mtime_ns == written:
                continue  # no step is logged yet
            lines = metrics.read_bytes().count(b"\n")
            logged = lines if logged is None else logged
            if lines >= logged + target:
                time.sleep(random.uniform(0.0, 0.1))
                break
        program.kill()
        return program.wait() == -signal.SIGKILL


def finish(file: str) -> int:
    with start(file) as program:
        return program.wait()


def start(file: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_idpo", "train", file],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
    )


def weights_bytes(output: Path) -> dict[str, bytes]:
    """Content of the exported weights' files."""
    files = {file.name: file.read_bytes() for file in (output / "hf").glob("*.safetensors")}
    assert files
    return files


def losses(output: Path) -> list[float]:
    """Of every step; each must be logged once."""
    records = [record for record in read_metrics(output / "metrics.jsonl") if "loss" in record]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in lines) == len(records)
    assert [int(record["step"]) for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= STEPS
    return [record["loss"] for record in records]

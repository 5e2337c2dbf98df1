"""Callbacks of `megatron_idpo.train` see every event of a run; the profiler is one of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import megatron_idpo
from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.recording import StepProfiler, recording_problems

from .tiny_run import write_files

EVENTS = [
    ("start", "run", 0, 2),
    ("log", 0, False),
    ("evaluation", 0, True),
    ("step", 1, True),
    ("log", 1, True),
    ("step", 2, True),
    ("log", 2, True),
    ("log", 2, False),
    ("evaluation", 2, True),
    ("checkpoint", 2, True),
    ("end", 2, True),
]


class Events(megatron_idpo.Callback):
    """Records what it receives."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, output: Path, *, step: int, total_steps: int) -> None:
        self.events.append(("start", output.name, step, total_steps))

    def on_step(self, step: int, values: Any) -> None:
        self.events.append(("step", step, "loss" in values))

    def on_log(self, step: int, values: Any) -> None:
        self.events.append(("log", step, "learning_rate" in values))

    def on_evaluation(self, step: int, values: Any) -> None:
        self.events.append(("evaluation", step, "eval_loss" in values))

    def on_checkpoint(self, step: int, directory: Path) -> None:
        self.events.append(("checkpoint", step, directory.is_dir()))

    def on_end(self, step: int, *, is_complete: bool) -> None:
        self.events.append(("end", step, is_complete))


def train_with_events(config: dict[str, Any]) -> dict[str, Any]:
    callback = Events()
    result = megatron_idpo.train(config, callbacks=[callback])
    traces = sorted((result.output / "profile").iterdir())
    trace = json.loads(gzip.decompress(traces[0].read_bytes()))
    return {
        "events": callback.events,
        "traces": [path.name for path in traces],
        "steps": sum(
            event.get("name", "").startswith("Optimizer.step") for event in trace["traceEvents"]
        ),
        "products": sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]),
    }


@pytest.mark.distributed
def test_callbacks_receive_every_event_and_a_step_is_traced(tmp_path, workers):
    files = write_files(tmp_path)
    config = {
        "model": {"path": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "train": str(files.train),
            "eval_fraction": 0.25,
            "row_tokens": 128,
            "max_length": 96,
            "num_workers": 1,
            "cache": str(tmp_path / "tokens"),
        },
        "objective": {"layers": [2]},
        "optimizer": {"lr": 1e-3},
        "training": {
            "output": str(tmp_path / "run"),
            "global_batch_pairs": 4,
            "max_steps": 2,
            "profile": [2, 2],
            "deterministic": True,
            "export": False,
        },
    }
    (result,) = workers.run(train_with_events, 1, config)
    assert result["events"] == EVENTS
    assert result["traces"] == ["rank0.trace.json.gz"] and result["products"] > 0
    assert result["steps"] == 1


def test_steps_that_a_run_does_not_have_cannot_be_traced(tmp_path):
    profiler = StepProfiler(5, 6, tmp_path, is_traced=False)
    with pytest.raises(ConfigError, match=r"training.profile: is \[5, 6\], and the run has 4"):
        profiler.on_start(tmp_path, step=0, total_steps=4)
    with pytest.raises(ConfigError, match="ends before it begins"):
        TrainingConfig(output="run", profile=(6, 5))


def test_memory_of_a_gpu_needs_one():
    (problem,) = recording_problems(TrainingConfig(output="run", memory_snapshot=True))
    assert problem.location == "training.memory_snapshot"
    assert recording_problems(TrainingConfig(output="run")) == []

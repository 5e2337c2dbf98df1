"""Runs on phantom GPUs: equal to the CPU path in every layout, and within budgets of waits.

All runs are shared by the tests. The CPU path is compared with the oracle in `tests/train`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_idpo.testing.phantom_gpu import run as run_command_line
from megatron_idpo.testing.phantom_gpu import run_python
from megatron_idpo.train.metrics.file import read_metrics
from tests.train.run_hooks import stop_after
from tests.train.tiny_run import Files, run

from .cuda_runs import CountGpu, command_line, lora_config, score, write_cuda_files

pytestmark = pytest.mark.distributed

LOSS_TOLERANCE = 1e-6
"""Of losses of about 0.7: the kernels are the CPU's, sums over a row have another order."""

WEIGHT_TOLERANCE = 5e-6
"""Of adapter weights up to 0.5."""

MAX_WAITS = 2
"""Of the host in a step: the sums for the log, and the gradient norm."""

MAX_LAUNCHES = 840
"""Kernels and products of a step: 812 with torch 2.14.1, not compiled."""

# Tensor and sequence parallelism: `test_command_line_trains_with_two_gpus`.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
    "context": (2, {"context": 2}),
}


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    output: Path
    found: Mapping[str, Any]

    @property
    def losses(self) -> list[float]:
        records = read_metrics(self.output / "metrics.jsonl")
        return [r[name] for r in records for name in ("loss", "eval_loss") if name in r]

    @property
    def adapter(self) -> dict[str, Tensor]:
        (file,) = self.output.glob("adapter/*.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_cuda_files(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="module")
def on_cpu(files: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output = tmp_path_factory.mktemp("cpu") / "run"
    (outcome,) = workers.run(run, 1, lora_config(files, output))
    assert outcome.code == 0
    return Finished(output, outcome.found)


@pytest.fixture(scope="module")
def on_gpu(
    files: Files, gpu_workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Finished]:
    known: dict[str, Finished] = {}

    def train(layout: str) -> Finished:
        if layout not in known:
            world_size, section = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("gpu") / "run"
            file = lora_config(files, output, layout=section)
            outcomes = gpu_workers.run(run, world_size, file, CountGpu(), timeout_s=300)
            assert [outcome.code for outcome in outcomes] == [0] * world_size
            known[layout] = Finished(output, outcomes[0].found)
        return known[layout]

    return train


def assert_equal(ours: Finished, theirs: Finished) -> None:
    assert ours.losses == pytest.approx(theirs.losses, abs=LOSS_TOLERANCE)
    assert ours.adapter.keys() == theirs.adapter.keys()
    for name, weight in ours.adapter.items():
        difference = float((weight - theirs.adapter[name]).abs().max())
        assert difference < WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_a_gpu_equals_training_on_the_cpu(on_gpu, on_cpu, layout):
    assert_equal(on_gpu(layout), on_cpu)


def test_stopped_run_resumes_on_the_gpu(files, gpu_workers, on_cpu, tmp_path):
    file = lora_config(files, tmp_path / "run")
    (stopped,) = gpu_workers.run(run, 1, file, stop_after(2), timeout_s=300)
    assert stopped.code != 0
    (resumed,) = gpu_workers.run(run, 1, file, timeout_s=300)
    assert resumed.code == 0
    assert_equal(Finished(tmp_path / "run", {}), on_cpu)


def test_reference_scored_on_the_gpu_equals_the_cpu(files, gpu_workers, workers, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for name, pool in (("gpu", gpu_workers), ("cpu", workers)):
        reference = {"source": "cache", "cache": str(tmp_path / f"{name}-cache")}
        file = lora_config(files, tmp_path / name, reference=reference, lora={"dropout": 0.0})
        assert pool.run(score, 1, file) == [0]
        parts = sorted((tmp_path / f"{name}-cache").rglob("*.parquet"))
        tables.append(pa.concat_tables(map(pq.read_table, parts)).to_pydict())
    ours, theirs = tables
    assert (ours["pair"], ours["layer"]) == (theirs["pair"], theirs["layer"])
    for column in ("chosen_logps", "rejected_logps"):
        assert ours[column] == pytest.approx(theirs[column], rel=1e-5)


SEQUENCE_LAYOUT = {"tensor": 2, "sequence_parallel": True}


def test_command_line_trains_with_two_gpus(files, gpu_workers, on_cpu, tmp_path):
    """In programs that join and choose their device themselves."""
    file = lora_config(files, tmp_path / "run", layout=SEQUENCE_LAYOUT)
    ended = gpu_workers.run_as_program(command_line, 2, "train", file, timeout_s=300)
    assert all(code == 0 and gemms > 0 for code, gemms, _ in ended)
    assert [devices for *_, devices in ended] == [[0], [1]]
    assert_equal(Finished(tmp_path / "run", {}), on_cpu)


@pytest.mark.exhaustive  # each process imports everything
def test_command_line_trains_with_two_gpus_in_new_processes(
    has_phantom_gpu, files, on_cpu, tmp_path
):
    file = lora_config(files, tmp_path / "run", layout=SEQUENCE_LAYOUT)
    ran = run_command_line(["train", file], ranks=2)
    assert ran.code == 0, ran.stderr
    assert_equal(Finished(tmp_path / "run", {}), on_cpu)
    assert all(counts.gemms > 0 for counts in ran.counts)


def test_programs_on_several_gpus_are_started_as_by_torchrun(has_phantom_gpu):
    program = (
        "import os, sys; rank = os.environ['RANK']; print('rank', rank);"
        "print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], file=sys.stderr);"
        "sys.exit(3 * int(rank))"
    )
    ran = run_python(["-c", program], os.environ, ranks=2)
    assert (ran.code, ran.stdout, ran.stderr) == (3, "rank 0\n", "0 2 0\n1 2 1\n")


def test_copies_for_a_save_are_pinned_and_waited_for_once(on_gpu):
    """The thread that writes them would read memory that is not filled yet."""
    for counts in on_gpu("one").found["copies"]:
        assert (counts.syncs, counts.pageable) == (1, 0) and counts.to_host > 1


def test_a_step_waits_for_the_gpu_a_few_times_only(on_gpu):
    for counts, waits in on_gpu("one").found["steps"][1:]:
        assert counts.syncs <= MAX_WAITS, waits


def test_a_step_launches_few_kernels(on_gpu):
    for counts, _ in on_gpu("one").found["steps"][1:]:
        assert counts.launches + counts.gemms <= MAX_LAUNCHES

"""Verbs and layouts that `test_training.py` leaves out, on phantom GPUs against the CPU path.

Virtual stages, experts over two ranks, sDPO, likelihood, generation, exported weights, and what a
run records about itself.
"""

import gzip
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.evaluate.likelihood.curves_file import read_curves
from megatron_idpo.testing import write_tiny_hf_model
from megatron_idpo.testing.phantom_gpu import run as run_command_line
from tests.evaluate.generate import tiny_answers
from tests.evaluate.likelihood.tiny_evaluation import Models, evaluation_config, likelihood
from tests.sdpo.stepped_run import stepped_config
from tests.train.tiny_run import SIZES, Files, exported, run, write_config, write_files

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
"""The normal run takes the same CUDA branches in `test_training.py`."""

WEIGHT_TOLERANCE = 5e-5
"""Absolute, of weights up to 0.5 after up to 8 steps with a learning rate of 0.01."""

CUDA_SIZES = {"head_dim": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("tiny"), **CUDA_SIZES)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    weights, expected = exported(ours), exported(theirs)
    assert weights.keys() == expected.keys() and weights
    for name, weight in weights.items():
        difference = float((weight - expected[name]).abs().max())
        assert difference < WEIGHT_TOLERANCE, f"{name}: {difference:.1e}"


def train_on_both(
    pools: tuple[Any, Any], ranks: tuple[int, int], files: Files, root: Path, **sections: Any
) -> None:
    """Full training with export, in a layout on phantom GPUs and on CPUs."""
    for name, pool, processes in zip(("gpu", "cpu"), pools, ranks, strict=True):
        file = write_config(files, root / name, **sections)
        outcomes = pool.run(run, processes, file, timeout_s=300)
        assert [outcome.code for outcome in outcomes] == [0] * processes, outcomes[0].printed
    assert_same_weights(root / "gpu", root / "cpu")


def test_virtual_stages_train_and_export(tiny, gpu_workers, workers, tmp_path):
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    train_on_both((gpu_workers, workers), (2, 2), tiny, tmp_path, layout=layout)


def test_all_weights_gathered_during_the_forward_pass(tiny, gpu_workers, workers, tmp_path):
    """On two data-parallel ranks, with a sharded optimizer; one CPU process gathers nothing."""
    train_on_both((gpu_workers, workers), (2, 1), tiny, tmp_path)


def test_experts_on_two_ranks_train_and_export(gpu_workers, workers, tmp_path):
    files = write_files(tmp_path, **CUDA_SIZES)
    write_tiny_hf_model(
        files.model, "mixtral", seed=2, **{**SIZES, **CUDA_SIZES}, num_local_experts=4
    )
    objective = {"router_aux_loss": 0.01}
    layout = {"expert": 2}
    pools = (gpu_workers, workers)
    train_on_both(pools, (2, 2), files, tmp_path, layout=layout, objective=objective)


@pytest.mark.parametrize("kind", ["full", "merge", "carry"])
def test_stepped_run(tiny, gpu_workers, workers, tmp_path, kind):
    for name, pool in (("gpu", gpu_workers), ("cpu", workers)):
        (outcome,) = pool.run(run, 1, stepped_config(tiny, tmp_path / name, kind), timeout_s=300)
        assert outcome.code == 0, outcome.printed
    assert_same_weights(tmp_path / "gpu", tmp_path / "cpu")


def test_likelihood_curves(tiny, gpu_workers, workers, tmp_path):
    other = tmp_path / "other"
    write_tiny_hf_model(other, "llama", seed=7, **{**SIZES, **CUDA_SIZES})
    for file in tiny.model.iterdir():
        if "token" in file.name:
            shutil.copy(file, other / file.name)
    models, curves = Models(tiny, other, tiny.held_out), []
    for name, pool in (("gpu", gpu_workers), ("cpu", workers)):
        file = evaluation_config(models, tmp_path / name, {"other": str(other)})
        ((code, printed),) = pool.run(likelihood, 1, file)
        assert code == 0, printed
        curves.append(read_curves(tmp_path / name / "likelihood" / "likelihood.csv"))
    for ours, theirs in zip(*curves, strict=True):
        assert ours.model == theirs.model
        for quantity in ("margin", "likelihood"):
            values = (curve.estimates[quantity].value_L for curve in (ours, theirs))
            assert next(values) == pytest.approx(next(values), abs=1e-4)


def answers(config: str, out: str) -> tuple[int, bytes]:
    """The verb `generate`; its exit code and file of answers."""
    from megatron_idpo.evaluate.generate.run import main

    torch.set_num_threads(1)
    code = main(Path(config), [f"evaluate.output={out}/out"])
    return code, tiny_answers.answered(Path(out))


def test_generated_answers(gpu_workers, workers, tmp_path):
    model = tiny_answers.write_model(tmp_path / "model", initializer_range=0.2)
    # Greedy: a GPU draws other random numbers than a CPU.
    config = str(tiny_answers.write_config(tmp_path, model, generate={"temperature": 0.0}))
    written = []
    for name, pool in (("gpu", gpu_workers), ("cpu", workers)):
        ((code, content),) = pool.run(answers, 1, config, str(tmp_path / name), timeout_s=300)
        assert code == 0
        written.append(content)
    assert written[0] == written[1]


def test_recorded_run(has_phantom_gpu, tiny, workers, tmp_path):
    """Deterministic kernels, a trace of steps, and the allocator's history."""
    training = {"deterministic": True, "profile": [2, 2]}
    (on_cpu,) = workers.run(run, 1, write_config(tiny, tmp_path / "cpu", training=training))
    assert on_cpu.code == 0, on_cpu.printed
    output = tmp_path / "gpu"
    file = write_config(tiny, output, training={**training, "memory_snapshot": True})
    ran = run_command_line(["train", file])
    assert ran.code == 0, ran.stderr
    assert_same_weights(output, tmp_path / "cpu")
    with gzip.open(output / "profile" / "rank0.trace.json.gz") as trace:
        assert any(event.get("name") == "aten::mm" for event in json.load(trace)["traceEvents"])
    snapshot = pickle.loads((output / "memory" / "rank0.pickle").read_bytes())
    assert any(event["action"] == "alloc" for event in snapshot["device_traces"][0])

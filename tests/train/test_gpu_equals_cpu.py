"""One training run by the command line on a GPU, equal to the CPU's: for `make gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_idpo.train.metrics.file import read_metrics
from tests.phantom_gpu.cuda_runs import lora_config, write_cuda_files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOSS_TOLERANCE = 1e-4
"""Of losses of about 0.7, in fp32 without TF32, after three steps."""

WEIGHT_TOLERANCE = 1e-3
"""Of adapter weights up to 0.5: Adam's first steps divide by gradients that are nearly 0."""


def train(file: str, environment: dict[str, str]) -> None:
    # The rehearsal of `make gpu` runs these tests on a phantom GPU.
    is_phantom = "PHANTOM_ARITHMETIC" in environment
    module = "megatron_idpo.testing.phantom_gpu" if is_phantom else "megatron_idpo"
    command = [sys.executable, "-W", "ignore", "-m", module, "train", file]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_run_on_a_gpu_equals_the_run_on_a_cpu(tmp_path: Path) -> None:
    files = write_cuda_files(tmp_path)
    on_gpu = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    kept = {k: v for k, v in on_gpu.items() if k != "LD_PRELOAD" and not k.startswith("PHANTOM_")}
    found = {}
    for name, environment in {"gpu": on_gpu, "cpu": kept | hidden}.items():
        output = tmp_path / name
        train(lora_config(files, output), environment)
        records = read_metrics(output / "metrics.jsonl")
        losses = [
            record[key] for record in records for key in ("loss", "eval_loss") if key in record
        ]
        (adapter,) = output.glob("adapter/*.safetensors")
        found[name] = (losses, load_file(adapter))
    (gpu_losses, gpu_weights), (cpu_losses, cpu_weights) = found["gpu"], found["cpu"]
    assert gpu_losses == pytest.approx(cpu_losses, abs=LOSS_TOLERANCE)
    for name, weight in gpu_weights.items():
        assert torch.allclose(weight, cpu_weights[name], atol=WEIGHT_TOLERANCE, rtol=0), name

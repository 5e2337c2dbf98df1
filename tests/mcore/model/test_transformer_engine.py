"""Transformer Engine's layer spec builds, trains and is saved like the local one (a stand-in)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "transformer_engine_run.py"
EXPERTS = ["experts rows", "experts loaded"]
RELATIVE = 1e-5
"""fp32 sums in another order."""

TIMEOUT_S = 600  # about 8 s on an idle machine


@pytest.mark.parametrize(
    ("world_size", "modes"),
    [
        (1, ["rows", "lora", *EXPERTS]),
        # Two processes, models of two kinds, checkpoints.
        pytest.param(1, ["packed", "loaded"], marks=pytest.mark.exhaustive),
        pytest.param(
            2, ["rows", "packed", "lora", "loaded", *EXPERTS], marks=pytest.mark.exhaustive
        ),
    ],
    ids=["one", "one-all", "tensor-and-sequence-parallel"],
)
def test_transformer_engine_layers_equal_local_layers(tmp_path, world_size, modes):
    """Gradients of rows, of packed sequences and of adapters, and weights from a checkpoint."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, RUN, str(rank), str(world_size), tmp_path / "rendezvous", *modes],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            printed, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, errors[-4000:]
            differences = dict(line.split(": ") for line in printed.splitlines() if ": " in line)
            for mode in modes:
                assert float(differences[mode]) <= RELATIVE, mode
    finally:
        for process in ranks:
            process.kill()

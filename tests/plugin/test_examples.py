"""The scripts in `examples/plugin/` run as they stand."""

import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from .pretrain_run import STEPS, check_flat, watching_memory

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugin"
CORE_LOOP = EXAMPLES / "megatron_core_loop.py"
MAX_HOOK_LINES = 15
LN2 = "0.693147"
TIMEOUT_S = 300


def leave_process_group() -> None:
    """Let a script create its process group, as under torchrun with one process."""
    import torch

    torch.distributed.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # it chooses a free port


def core_loop() -> str:
    """What the script prints on this rank."""
    leave_process_group()
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(CORE_LOOP), run_name="__main__")
    return printed.getvalue()


def check_losses(printed: str) -> None:
    values = dict(re.findall(r"^step (\d .*?) (\S+)$", printed, re.M))
    for name in ("loss", "final loss", "layer 2 loss"):
        first, second, third = (float(values[f"{step} {name}"]) for step in range(3))
        assert values[f"0 {name}"] == LN2 and third < second < first
    assert float(values["2 rewards/margins"]) > 0 == float(values["0 rewards/margins"])


def test_the_core_loop_trains(workers):
    (printed,) = workers.run(core_loop, 1)
    check_losses(printed)


def test_the_hook_in_the_core_loop_is_short():
    own = [line for line in CORE_LOOP.read_text().splitlines() if line.endswith("  #")]
    assert any("attach(" in line for line in own) and len(own) <= MAX_HOOK_LINES


@pytest.mark.exhaustive  # starts three interpreters
def test_the_core_loop_runs_under_torchrun(tmp_path):
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    process = subprocess.run(
        [sys.executable, "-m", *launcher, str(CORE_LOOP)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr
    check_losses(process.stdout)


def long_core_loop(every: int) -> list[tuple[int, int]]:
    """Memory of the script's process during `STEPS` steps (`watching_memory`)."""
    leave_process_group()
    spec = importlib.util.spec_from_file_location("megatron_core_loop", CORE_LOOP)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.STEPS = STEPS
    with redirect_stdout(io.StringIO()), watching_memory(every) as seen:
        script.main()
    return seen


@pytest.mark.exhaustive  # two hundred steps
def test_memory_of_the_core_loop_is_flat(workers):
    (seen,) = workers.run(long_core_loop, 1, STEPS // 10)
    check_flat(seen)

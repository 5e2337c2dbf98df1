"""The scripts in `examples/plugin/` run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugin"
CORE_LOOP = EXAMPLES / "megatron_core_loop.py"
MAX_HOOK_LINES = 15
LN2 = "0.693147"
TIMEOUT_S = 120  # it takes about 10 s on an idle machine


def test_the_core_loop_trains(tmp_path):
    # What torchrun would set for one process; the process chooses a free port itself.
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, str(CORE_LOOP)],
        cwd=tmp_path,
        env={**os.environ, **torchrun},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr
    values = dict(re.findall(r"^step (\d .*?) (\S+)$", process.stdout, re.M))
    for name in ("loss", "final loss", "layer 2 loss"):
        first, second, third = (float(values[f"{step} {name}"]) for step in range(3))
        assert values[f"0 {name}"] == LN2 and third < second < first
    assert float(values["2 rewards/margins"]) > 0 == float(values["0 rewards/margins"])


def test_the_hook_in_the_core_loop_is_short():
    own = [line for line in CORE_LOOP.read_text().splitlines() if line.endswith("  #")]
    assert any("attach(" in line for line in own) and len(own) <= MAX_HOOK_LINES

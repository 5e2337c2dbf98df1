"""Transformer Engine's layer spec builds, trains and is saved like the local one (a stand-in)."""

import os
import re
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "transformer_engine_run.py"
RELATIVE = 1e-5
"""fp32 sums in another order."""

TIMEOUT_S = 300  # about 8 s on an idle machine


def test_a_step_with_transformer_engine_layers_equals_one_with_local_layers():
    process = subprocess.run(
        [sys.executable, str(RUN)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    (difference,) = re.findall(r"^relative difference (\S+)$", process.stdout, re.M)
    assert float(difference) <= RELATIVE

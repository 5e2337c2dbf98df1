"""The training script in `docs/how_it_works.md` runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.md"
LN2 = "0.693147"
TIMEOUT_S = 120  # it takes about 10 s on an idle machine


def test_the_example_trains(tmp_path):
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    # What torchrun would set for one process; the process chooses a free port itself.
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "train.py"],
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

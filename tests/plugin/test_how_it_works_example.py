"""The training script in `docs/how_it_works.md` runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_idpo.testing import write_tiny_hf_model

PAGE = Path(__file__).parents[2] / "docs" / "how_it_works.md"
LN2 = "0.693147"
TIMEOUT_S = 120  # it takes about 10 s on an idle machine


def test_the_example_trains(tmp_path):
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    write_tiny_hf_model(tmp_path / "model", "llama")
    # What torchrun would set for one process; the process chooses a free port itself.
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "train.py", "model"],
        cwd=tmp_path,
        env={**os.environ, **torchrun},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr
    lines = re.findall(r"^step (\d) layer (\d) loss (\S+)$", process.stdout, re.M)
    assert [line[:2] for line in lines] == [(step, layer) for step in "012" for layer in "34"]
    losses = {(step, layer): loss for step, layer, loss in lines}
    for layer in "34":
        assert losses["0", layer] == LN2
        assert float(losses["2", layer]) < float(losses["1", layer]) < float(LN2)

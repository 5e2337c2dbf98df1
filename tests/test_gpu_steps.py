"""`make gpu`: a step that hangs or fails does not starve the later ones."""

import os
import runpy
import time
from pathlib import Path

GPU = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "gpu.py"))

HANGS = """import subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid)); child.wait()"""


def test_a_step_that_hangs_ends_with_its_children_and_runs_last_again(tmp_path, capsys):
    pid = tmp_path / "pid"
    hangs = GPU["Step"]("hangs", ("-c", HANGS, str(pid)), 1)
    works = GPU["Step"]("works", ("-c", "print('{\"x\": 1}')"), 1)
    results = GPU["run_steps"]([hangs, works], tmp_path / "out", 60, dict(os.environ))
    assert results["hangs"]["code"] == 124 and results["works"]["measured"] == {"x": 1}
    time.sleep(0.1)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    (tmp_path / "out" / "works.json").unlink()
    capsys.readouterr()
    GPU["run_steps"]([hangs, works], tmp_path / "out", 60, dict(os.environ))
    assert capsys.readouterr().out.splitlines()[0].startswith("works: code 0")

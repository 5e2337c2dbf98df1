"""The output of the convert command: one line per conversion, none of megatron-core."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

BOTH = """
import sys
from megatron_idpo.cli.main import main
hf, between, back = sys.argv[1:]
sys.exit(main(["convert", "hf-to-megatron", hf, between]) or
         main(["convert", "megatron-to-hf", between, back, "--dtype", "bf16"]))
"""


def wrote(target: Path, size: str) -> str:
    return rf"wrote {target}: 39 tensors, {size}, in \d+\.\d s\n"


def test_each_conversion_prints_one_line(tiny_llama, tmp_path):
    between, back = tmp_path / "between", tmp_path / "back"
    command = [sys.executable, "-c", BOTH, *map(str, (tiny_llama, between, back))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    there, again = wrote(between, r"0\.7 MB of float32"), wrote(back, r"0\.4 MB of bfloat16")
    assert re.fullmatch(there + again, done.stdout), done.stdout
    assert (back / "model.safetensors").is_file()


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_idpo convert"


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *TORCHRUN.split(), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # otherwise torchrun prints that it sets it
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.exhaustive
def test_several_processes_print_one_line(tiny_llama, tmp_path):
    done = torchrun("hf-to-megatron", tiny_llama, tmp_path / "out", "--tensor", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(wrote(tmp_path / "out", r"0\.7 MB of float32"), done.stdout), done.stdout


@pytest.mark.exhaustive
def test_several_processes_print_one_error(tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    done = torchrun("hf-to-megatron", tiny_llama, tmp_path / "out", "--tensor", 2)
    assert done.returncode != 0 and done.stdout == ""
    message = [line for line in done.stderr.splitlines() if line.startswith("megatron-idpo: error")]
    assert len(message) == 1
    assert "exists and is not a checkpoint" in message[0]
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]

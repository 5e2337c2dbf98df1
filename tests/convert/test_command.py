"""The convert command: one line per conversion; a kill leaves nothing that looks complete.

Nothing of megatron-core is printed, by its import neither.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idpo.storage import atomic

pytestmark = pytest.mark.distributed

# One process imports everything, like a command that ends with an error, and forks a child for each
# conversion. A killed one has written everything but the target's name.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import transformers.modeling_rope_utils
from transformers import LlamaConfig
from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu
redirect_cuda_to_cpu()  # as a script calls it; it imports most of megatron-core
from megatron_idpo.cli.main import main
from megatron_idpo.storage import atomic

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def convert(*words, killed=False):
    child = os.fork()
    if child == 0:
        if killed:
            atomic.publish_directory = die
        os._exit(main(["convert", *words]))
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if killed else 0), f"{words}: {status}"
    assert Path(words[2]).exists() != killed, f"{words}, killed: {killed}"

hf, megatron, back, halved = sys.argv[1:]
assert main(["convert", "hf-to-megatron", hf, megatron, "--tensor", "0"]) != 0
for killed in (True, False):
    convert("hf-to-megatron", hf, megatron, killed=killed)
for killed in (True, False):
    convert("megatron-to-hf", megatron, back, killed=killed)
convert("megatron-to-hf", megatron, halved, "--dtype", "bf16")
"""


@pytest.fixture(scope="module")
def program(tiny_llama, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The ended program and the directory with its results."""
    root = tmp_path_factory.mktemp("convert")
    targets = [root / name for name in ("megatron", "back", "halved")]
    # Python warns of forks in a process with threads.
    options = ["-W", "ignore::DeprecationWarning", "-c", PROGRAM]
    command = [sys.executable, *options, *map(str, (tiny_llama, *targets))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done, root


def wrote(target: Path, size: str) -> str:
    return rf"wrote {target}: 39 tensors, {size}, in \d+\.\d s\n"


def test_each_conversion_prints_one_line(program):
    done, root = program
    assert done.returncode == 0, done.stderr
    expected = wrote(root / "megatron", r"0\.7 MB of float32")
    expected += wrote(root / "back", r"0\.7 MB of float32")
    expected += wrote(root / "halved", r"0\.4 MB of bfloat16")
    assert re.fullmatch(expected, done.stdout), done.stdout
    assert re.fullmatch(r"megatron-idpo: error: layout\.tensor: .*\n", done.stderr), done.stderr


def test_killed_conversion_can_be_repeated(program, tiny_llama):
    done, root = program
    assert done.returncode == 0, done.stderr
    leftovers = [len(atomic.leftovers(root / name)) for name in ("megatron", "back")]
    assert leftovers == [1, 1]
    visible = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    assert visible == {"megatron", "back", "halved"}
    for path in tiny_llama.iterdir():
        assert (root / "back" / path.name).read_bytes() == path.read_bytes()


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

"""A killed conversion leaves nothing that looks complete, and can be run again."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idpo.storage import atomic

# One process imports megatron-core and forks a child for every kill.
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_idpo.storage import atomic
from megatron_idpo.checkpoint import dcp_io
from megatron_idpo.convert import hf_to_megatron, megatron_to_hf
from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

def killing(function, calls):
    left = [calls]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def convert(there, source, target, owner=None, name="", calls=0):
    child = os.fork()
    if child == 0:
        if owner is not None:
            setattr(owner, name, killing(getattr(owner, name), calls))
        (hf_to_megatron if there else megatron_to_hf).convert(source, target)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (0 if owner is None else signal.SIGKILL), f"{name}: {status}"
    assert target.exists() == (owner is None), f"after a kill in {name}"

hf, megatron, back = map(Path, sys.argv[1:])
convert(True, hf, megatron, dcp_io._SavePlanner, "resolve_data", 40)
convert(True, hf, megatron, atomic, "publish_directory", 0)
convert(True, hf, megatron)
convert(False, megatron, back, HfWriter, "write", 9)
convert(False, megatron, back, atomic, "publish_directory", 0)
convert(False, megatron, back)
"""


@pytest.mark.distributed
def test_killed_conversion_can_be_repeated(tiny_llama: Path, tmp_path: Path) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        KILLED,
        *map(str, (tiny_llama, megatron, back)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (len(atomic.leftovers(megatron)), len(atomic.leftovers(back))) == (2, 2)
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert visible == {"megatron", "back"}
    for path in tiny_llama.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()

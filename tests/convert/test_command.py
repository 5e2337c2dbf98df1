"""The convert command: one line per conversion; a kill leaves nothing that looks complete.

Nothing of megatron-core is printed.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_idpo.cli.main import main
from megatron_idpo.storage import atomic

pytestmark = pytest.mark.distributed

TARGETS = ("megatron", "back", "halved")


# ---- on a worker --------------------------------------------------------------------------------


def conversions(hf: Path, root: Path) -> tuple[str, str]:
    """stdout and stderr of an invalid command, then of conversions that are killed and repeated.

    Each conversion is a fork. A killed one has written everything but the target's name.
    """
    megatron, back, halved = (root / name for name in TARGETS)
    with (
        captured(root.with_name("stdout"), 1) as stdout,
        captured(root.with_name("stderr"), 2) as stderr,
    ):
        assert main(["convert", "hf-to-megatron", str(hf), str(megatron), "--tensor", "0"]) != 0
        for is_killed in (True, False):
            convert("hf-to-megatron", hf, megatron, is_killed=is_killed)
        for is_killed in (True, False):
            convert("megatron-to-hf", megatron, back, is_killed=is_killed)
        convert("megatron-to-hf", megatron, halved, "--dtype", "bf16")
    return stdout.read_text(), stderr.read_text()


def convert(*words: object, is_killed: bool = False) -> None:
    child = os.fork()
    if child == 0:
        if is_killed:
            atomic.publish_directory = die
        os._exit(main(["convert", *map(str, words)]))
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if is_killed else 0), f"{words}: {status}"
    assert Path(str(words[2])).exists() != is_killed, f"{words}, killed: {is_killed}"


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def captured(path: Path, descriptor: int) -> Iterator[Path]:
    """Everything written to a descriptor within the block is in a file, also that of forks."""
    kept = os.dup(descriptor)
    with path.open("w") as file:
        os.dup2(file.fileno(), descriptor)
    try:
        yield path
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept, descriptor)
        os.close(kept)


# ---- tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tiny_llama, workers, tmp_path_factory) -> tuple[Path, str, str]:
    """The directory with all targets; stdout and stderr."""
    root = tmp_path_factory.mktemp("convert") / "targets"
    root.mkdir()
    (printed,) = workers.run_as_program(conversions, 1, tiny_llama, root)
    return root, *printed


def wrote(target: Path, size: str) -> str:
    return rf"wrote {target}: 39 tensors, {size}, in \d+\.\d s\n"


def test_each_conversion_prints_one_line(converted):
    root, stdout, stderr = converted
    expected = wrote(root / "megatron", r"0\.7 MB of float32")
    expected += wrote(root / "back", r"0\.7 MB of float32")
    expected += wrote(root / "halved", r"0\.4 MB of bfloat16")
    assert re.fullmatch(expected, stdout), stdout
    assert re.fullmatch(r"megatron-idpo: error: layout\.tensor: .*\n", stderr), stderr


def test_killed_conversion_can_be_repeated(converted, tiny_llama):
    root, *_ = converted
    leftovers = [len(atomic.leftovers(root / name)) for name in ("megatron", "back")]
    assert leftovers == [1, 1]
    visible = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    assert visible == {*TARGETS}
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

"""What a conversion shows: nothing but one line, unless somebody looks at a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_idpo.convert.progress import busy, report_written, tensor_progress, weights_bytes

SHAPES = {"a": (1000, 2000), "b": (3,)}


@pytest.mark.parametrize("show", [False, True])
def test_without_a_terminal_items_pass_in_silence(show, capfd):
    with busy("waiting", show=show):
        assert list(tensor_progress("reading", iter("abc"), total=3, show=show)) == list("abc")
    assert capfd.readouterr() == ("", "")


AT_A_TERMINAL = """
from megatron_idpo.convert.progress import busy, tensor_progress
with busy("waiting for it", show={show}):
    pass
list(tensor_progress("reading", iter("abc"), total=3, show={show}))
"""


@pytest.mark.parametrize("show", [True, False])
def test_a_terminal_is_shown_a_bar_on_stderr(show):
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", AT_A_TERMINAL.format(show=show)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, env=environment, check=True)
    os.close(end)
    assert done.stdout == b""
    os.set_blocking(terminal, False)
    try:
        shown = os.read(terminal, 100_000).decode()
    except OSError:  # nothing was written, and nobody can any more
        shown = ""
    os.close(terminal)
    assert ("waiting for it" in shown and "reading" in shown and "3/3" in shown) == show
    assert show or shown == ""


def test_bytes():
    assert weights_bytes(SHAPES, torch.bfloat16) == 2 * 2_000_003
    assert weights_bytes(SHAPES, torch.float32) == 4 * 2_000_003


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES, "wrote some/where: 2 tensors, 4.0 MB of bfloat16, in 12.3 s\n"),
        ({"a": (1000, 1000, 1000)}, "wrote some/where: 1 tensors, 2.0 GB of bfloat16, in 12.3 s\n"),
    ],
)
def test_the_line_at_the_end(shapes, message, capsys):
    report_written(Path("some/where"), shapes, torch.bfloat16, 12.34)
    assert capsys.readouterr() == (message, "")

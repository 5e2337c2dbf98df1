"""Shared by the tests of both directions: conversions that fail, and limited disks."""

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

BOUND_S = 60.0
"""Limit for every conversion: a rank that hangs in a collective would wait half an hour."""


def attempt(
    direction: str,
    source: str,
    target: str,
    layout: Layout,
    sabotage: Callable[[], Any] | None = None,
    rank: int = 0,
    **options: Any,
) -> str | None:
    """On every rank: converts, with one rank sabotaged; returns the error message."""
    import torch.distributed as dist

    from megatron_idpo.convert import hf_to_megatron, megatron_to_hf
    from megatron_idpo.errors import UserError

    module = hf_to_megatron if direction == "there" else megatron_to_hf
    here = sabotage() if sabotage is not None and dist.get_rank() == rank else nullcontext()
    try:
        with here:
            module.convert(Path(source), Path(target), layout=layout, **options)
    except UserError as error:
        return str(error)
    return None


@contextmanager
def small_files(num_bytes: int = 100_000) -> Iterator[None]:
    """Sabotage: this process cannot write larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def attempt_on(workers) -> Callable[..., list[str | None]]:
    """Runs `attempt` on all ranks of the layout; returns each rank's message."""

    def run(direction: str, source: Path, target: Path, layout: Layout | None = None, **options):
        layout = layout or Layout()
        return workers.run(
            attempt,
            layout.model_ranks,
            direction,
            str(source),
            str(target),
            layout,
            timeout_s=BOUND_S,
            **options,
        )

    return run


@pytest.fixture
def file_limit() -> Callable[[], Any]:
    """Sabotage: the file of a rank is larger than the limit."""
    return small_files


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama; read-only."""
    return write_tiny_hf_model(tmp_path_factory.mktemp("llama"), "llama", seed=1)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts file systems of a given size in bytes; skips the test without permission to."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True)
        except OSError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip("mounting needs root")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)

"""The phantom GPU of this process: arithmetic and collectives, counters, budgets.

For processes that `launch.py` started, or a worker of `WorkerPool(device="phantom")`.
"""

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_idpo.testing.phantom_gpu.arithmetic import HostArithmetic, host_tensor
from megatron_idpo.testing.phantom_gpu.collectives import fake_world, gloo_for_nccl
from megatron_idpo.testing.phantom_gpu.compiled import attend_without_result, compute_as_written
from megatron_idpo.testing.phantom_gpu.counters import Counts
from megatron_idpo.testing.phantom_gpu.launch import ARITHMETIC, REPORT

_SYNC_MESSAGE = "called a synchronizing CUDA operation"
"""torch's warning in `set_sync_debug_mode("warn")`."""


class BudgetExceeded(AssertionError):
    """A block asked more of the device than its budget allows."""


@dataclass
class PhantomGpu:
    """What this process has asked of its device."""

    waits: Counter[str] = field(default_factory=Counter)
    """`path:line` -> how often that line waited for the device. The line is the innermost outside
    of torch; the path begins in the package. Explicit waits (`torch.cuda.synchronize`) are only in
    `Counts.syncs`."""

    def waits_in(self, path: str) -> int:
        """Waits of all lines of a file, for example `train/step.py`."""
        return sum(n for line, n in self.waits.items() if line.rpartition(":")[0] == path)

    @contextmanager
    def budget(
        self,
        *,
        launches: int | None = None,
        syncs: int | None = None,
        reads: Mapping[str, int] | None = None,
        peak_bytes: int | None = None,
    ) -> Iterator[None]:
        """Check what the block asks of the device.

        Args:
            launches: at most so many kernels and matrix products.
            syncs: at most so many waits of the host.
            reads: file -> at most so many waits in its lines (`waits_in`).
            peak_bytes: at most so much memory allocated by tensors at once.

        Raises:
            BudgetExceeded: with every line that waited.
        """
        before, waits_before = Counts.now(), Counter(self.waits)
        torch.cuda.reset_peak_memory_stats()
        yield
        used = Counts.now().since(before)
        waits = self.waits - waits_before
        checks = [
            ("launches", used.launches + used.gemms, launches),
            ("syncs", used.syncs, syncs),
            ("peak bytes", torch.cuda.max_memory_allocated(), peak_bytes),
        ]
        for path, allowed in (reads or {}).items():
            checks.append((f"waits in {path}", PhantomGpu(waits).waits_in(path), allowed))
        over = [
            f"{name}: {value:,}, at most {allowed:,}"
            for name, value, allowed in checks
            if allowed is not None and value > allowed
        ]
        if over:
            lines = [f"  {line} waited {n} times" for line, n in waits.most_common()]
            raise BudgetExceeded("\n".join([*over, *lines]))


_current: list[PhantomGpu] = []
"""Of the `phantom` blocks that are open."""


def current_gpu() -> PhantomGpu:
    """The phantom GPU of the innermost block, for code that is called within it."""
    return _current[-1]


@contextmanager
def phantom(world: tuple[int, int] | None = None) -> Iterator[PhantomGpu]:
    """Use the phantom GPU within the block.

    The process's environment says whether it computes (`launch.environment`).

    Args:
        world: rank and size of a world of which no other rank exists, without arithmetic; None:
            processes communicate over gloo.

    Raises:
        RuntimeError: the process was not started for a phantom GPU.
    """
    before, arithmetic, gpu = Counts.now(), os.environ[ARITHMETIC], PhantomGpu()
    assert world is None or arithmetic == "none", "collectives of a fake world give no results"
    with ExitStack() as stack:
        stack.enter_context(_recorded_waits(gpu.waits))
        stack.enter_context(gloo_for_nccl() if world is None else fake_world(*world))
        if arithmetic == "none":
            stack.enter_context(attend_without_result())
        else:
            stack.enter_context(compute_as_written(compiles=arithmetic == "compiled"))
            stack.enter_context(_tensors_print_from_host())
            stack.enter_context(HostArithmetic())
        _current.append(gpu)
        try:
            yield gpu
        finally:
            _current.remove(gpu)
            if REPORT in os.environ:
                report = {"counts": asdict(Counts.now().since(before)), "waits": gpu.waits}
                Path(os.environ[REPORT]).write_text(json.dumps(report))


@contextmanager
def _tensors_print_from_host() -> Iterator[None]:
    """`repr` of CUDA tensors: torch disables dispatch modes there, and its kernels do nothing."""
    show = torch._tensor_str._str

    def show_host(tensor: Any, **options: Any) -> str:
        text: str = show(host_tensor(tensor.detach()) if tensor.is_cuda else tensor, **options)
        return text

    with patch.object(torch._tensor_str, "_str", show_host):
        yield


@contextmanager
def _recorded_waits(waits: Counter[str]) -> Iterator[None]:
    """Count the lines that wait for the device, through torch's own debugging aid."""
    show = warnings.showwarning

    def record(message: Any, *args: Any, **kwargs: Any) -> None:
        if _SYNC_MESSAGE in str(message):
            waits[_waiting_line()] += 1
        else:
            show(message, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", f".*{_SYNC_MESSAGE}")
        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = record
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _waiting_line() -> str:
    """The innermost frame outside of torch and of the stand-in."""
    own = str(Path(__file__).parent)
    frame = sys._getframe(1)
    while True:
        path = frame.f_code.co_filename
        is_library = "/torch/" in path or path.startswith(own) or path.endswith("/warnings.py")
        is_library = is_library or path.endswith("/contextlib.py")
        if not is_library or frame.f_back is None:
            break
        frame = frame.f_back
    for root in ("/megatron_idpo/", "/site-packages/"):
        path = path.rpartition(root)[2]
    return f"{path}:{frame.f_lineno}"

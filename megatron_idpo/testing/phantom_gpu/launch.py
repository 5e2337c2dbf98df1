"""Starts programs on phantom GPUs: always in processes apart, whose environment preloads them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from megatron_idpo.testing.phantom_gpu.build import DRIVER_DIRECTORY, PRELOADED, build
from megatron_idpo.testing.phantom_gpu.counters import Counts

type Arithmetic = Literal["eager", "compiled", "none"]
"""`eager`: right results, without torch.compile. `compiled`: right results, and everything that is
compiled is compiled for the GPU too. `none`: memory, launches and waits only."""

ARITHMETIC = "PHANTOM_ARITHMETIC"
REPORT = "PHANTOM_REPORT"
"""Environment: the kind of arithmetic, and a file for counters."""

GPU_BYTES = 80 << 30
"""Of an H100."""

_PEER_GRACE_S = 10.0
"""How long the other ranks may run after one has failed."""

_POLL_S = 0.02


@dataclass(frozen=True)
class Ran:
    """What a program did on phantom GPUs."""

    code: int
    """Exit code: of the first rank that failed, or 0."""

    stdout: str
    """Of rank 0."""

    stderr: str
    """Of all ranks, in order."""

    counts: list[Counts]
    """By rank; empty if a rank ended without them."""

    waits: list[dict[str, int]]
    """By rank: which lines waited for the device, and how often (`device.PhantomGpu.waits`)."""


def default_cache() -> Path:
    """Where compiled libraries and kernels are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megatron-idpo" / "phantom-gpu"


def environment(
    *,
    gpus: int = 1,
    bytes_per_gpu: int = GPU_BYTES,
    arithmetic: Arithmetic = "eager",
    cache: Path | None = None,
) -> dict[str, str]:
    """The environment of a process on phantom GPUs; it builds the stand-in if needed.

    Args:
        gpus: number of devices.
        bytes_per_gpu: memory of each.
        arithmetic: whether results are right.
        cache: for the libraries and for compiled kernels; None is `default_cache`.

    Raises:
        RuntimeError: `why_not` has a reason.
    """
    cache = default_cache() if cache is None else cache
    libraries = build(cache)
    driver = libraries / DRIVER_DIRECTORY
    variables = {name: v for name, v in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    variables |= {
        "LD_PRELOAD": _joined(libraries / PRELOADED, os.environ.get("LD_PRELOAD"), " "),
        "LD_LIBRARY_PATH": _joined(driver, os.environ.get("LD_LIBRARY_PATH"), os.pathsep),
        "TRITON_LIBCUDA_PATH": str(driver),
        "PHANTOM_GPUS": str(gpus),
        "PHANTOM_GPU_BYTES": str(bytes_per_gpu),
        ARITHMETIC: arithmetic,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if arithmetic != "compiled":
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def run(
    arguments: Sequence[str],
    ranks: int = 1,
    bytes_per_gpu: int = GPU_BYTES,
    arithmetic: Arithmetic = "eager",
    *,
    cache: Path | None = None,
    timeout_s: float = 600.0,
) -> Ran:
    """The command line of this package on phantom GPUs, as torchrun would start it.

    Args:
        arguments: of `megatron-idpo`, for example `["train", "run.yaml"]`.
        ranks: processes, each on a GPU. A single one is started as a plain program.
        bytes_per_gpu: memory of each.
        arithmetic: as in `environment`.
        cache: as in `environment`.
        timeout_s: for all ranks together.

    Raises:
        TimeoutError: they were still running, and are killed.
        RuntimeError: `why_not` has a reason.
    """
    module = "megatron_idpo.testing.phantom_gpu"
    variables = environment(
        gpus=ranks, bytes_per_gpu=bytes_per_gpu, arithmetic=arithmetic, cache=cache
    )
    return run_python(["-m", module, *arguments], variables, ranks=ranks, timeout_s=timeout_s)


def run_python(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    *,
    ranks: int = 1,
    timeout_s: float = 600.0,
) -> Ran:
    """A Python program, which uses `device.phantom`, on phantom GPUs.

    Args:
        arguments: of the interpreter.
        variables: from `environment`.
        ranks: processes.
        timeout_s: for all of them together.

    Raises:
        TimeoutError: they were still running, and are killed.
    """
    with TemporaryDirectory(prefix="phantom-gpu-") as name:
        directory = Path(name)
        processes = []
        rendezvous = _rendezvous(ranks)
        for rank in range(ranks):
            with (
                (directory / f"{rank}.out").open("w") as stdout,
                (directory / f"{rank}.err").open("w") as stderr,
            ):
                own = {**variables, **rendezvous, REPORT: str(directory / f"{rank}.json")}
                if ranks > 1:
                    own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, *arguments]
                processes.append(
                    subprocess.Popen(
                        command, env=own, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
                    )
                )
        try:
            code = _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        reports = [directory / f"{rank}.json" for rank in range(ranks)]
        read = [json.loads(path.read_text()) for path in reports if path.exists()]
        stderrs = [(directory / f"{rank}.err").read_text() for rank in range(ranks)]
        return Ran(
            code,
            (directory / "0.out").read_text(),
            "".join(stderrs),
            [Counts(**report["counts"]) for report in read],
            [report["waits"] for report in read],
        )


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _joined(first: Path, rest: str | None, separator: str) -> str:
    return separator.join([str(first), *([rest] if rest else [])])


def _rendezvous(ranks: int) -> dict[str, str]:
    """torchrun's variables that all ranks share; none for a single process."""
    if ranks == 1:
        return {}
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # gloo looks the host name up, which may not belong to an interface of this machine.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(processes: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> int:
    """Exit code of the first process that fails, or 0 when all have ended."""
    deadline, code = time.monotonic() + timeout_s, 0
    while any(process.poll() is None for process in processes):
        if not code and (failed := [p.returncode for p in processes if p.returncode]):
            code = failed[0]
            deadline = min(deadline, time.monotonic() + _PEER_GRACE_S)
        if time.monotonic() > deadline:
            if code:
                return code
            raise TimeoutError(f"not finished after {timeout_s:g} s")
        time.sleep(_POLL_S)
    return code or next((p.returncode for p in processes if p.returncode), 0)

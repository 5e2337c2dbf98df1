"""`starts.jsonl`: when, where and with which versions a run was started, one line per start.

A run that is interrupted may be resumed on another machine or with other versions; the report lists
them. A line contains no host name and no user name, because reports are mailed; the command may
contain paths, as `config.yaml` does.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_idpo import __version__
from megatron_idpo.errors import ConfigError
from megatron_idpo.storage.atomic import append_bytes, write_bytes

FILE = "starts.jsonl"
LIBRARIES = ("torch", "megatron-core", "transformers", "transformer-engine")
"""Libraries whose version is recorded if they are installed."""

_PACKAGE = Path(__file__).parents[1]
_GIT_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run."""

    time: str
    """ISO 8601, UTC, to the second."""

    step: int
    """Steps that were complete."""

    total_steps: int
    command: str
    processes: int
    device: str
    """Of the first process: `NVIDIA H200`, or the processor and its cores."""

    held_out: str | None = None
    """Fingerprint of the held-out pairs; None without any."""

    commit: str | None = None
    """Of the checkout that the package was imported from, with `+` if it has changes; None for an
    installed package."""

    versions: dict[str, str] = field(default_factory=dict)


def this_start(
    *, step: int, total_steps: int, processes: int, held_out: str | None = None
) -> Start:
    """The start of this process."""
    return Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        step=step,
        total_steps=total_steps,
        command=_command(),
        processes=processes,
        held_out=held_out,
        device=_device(),
        commit=commit_of(_PACKAGE),
        versions={
            "megatron-idpo": __version__,
            "python": platform.python_version(),
            **dict(_library_versions()),
        },
    )


def write_start(root: Path, start: Start) -> None:
    """Append a start; the first one (`step` 0) replaces those of an earlier run.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = root / FILE
    line = f"{json.dumps(asdict(start), ensure_ascii=False)}\n".encode("utf-8", "replace")
    remedy = "check that its directory exists"
    with ConfigError.on_os_error("training.output", f"cannot write {path}", remedy):
        if start.step:
            append_bytes(path, line)
        else:
            write_bytes(path, line)


def read_starts(root: Path) -> list[Start]:
    """The starts of a run, or of all steps of an sDPO run, by time; damaged lines are left out."""
    adapter, starts = TypeAdapter(Start), []
    for path in (root / FILE, *root.glob(f"step-*/{FILE}")):
        if not path.is_file():
            continue
        for line in path.read_bytes().splitlines():
            try:
                starts.append(adapter.validate_json(line))
            except ValidationError:
                continue
    return sorted(starts, key=lambda start: start.time)


def commit_of(package: Path) -> str | None:
    """The commit of the checkout that tracks a package; None if git does not track it.

    An environment may lie within the checkout of another project, whose commit would mislead.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--exclude=*", "--dirty=+")


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails, or git is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command() -> str:
    """As it was typed, after torchrun; a script or a notebook by its file's name."""
    program = Path(sys.argv[0] or "python")
    is_ours = program.name in ("megatron-idpo", "__main__.py")
    name = "megatron-idpo" if is_ours else program.name
    return shlex.join([name, *sys.argv[1:]])


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return f"{_processor()}, {cores} {'core' if cores == 1 else 'cores'}"


def _processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _library_versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue

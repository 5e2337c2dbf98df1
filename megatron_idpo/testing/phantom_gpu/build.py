"""Compiles the stand-in's libraries with gcc, once per version of their sources and of torch."""

import functools
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

_SOURCES = Path(__file__).parent
_COMPILED = ("phantom.h", "runtime.c", "blas.c", "driver.c")
_CUDA_MAJOR = 13
"""Of the runtime's interface that `runtime.c` implements."""

PRELOADED = "libphantom.so"
DRIVER_DIRECTORY = "driver"


@functools.cache
def why_not() -> str | None:
    """The reason why phantom GPUs cannot be used on this machine; None if they can."""
    if sys.platform != "linux":
        return f"needs LD_PRELOAD as on Linux, not {sys.platform}"
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if (directory := _package("torch")) is None:
        return "torch is not installed"
    match = re.search(r"^cuda.*= '(\d+)", (directory / "version.py").read_text(), re.MULTILINE)
    if match is None:
        return "torch is a build without CUDA"
    if int(match[1]) != _CUDA_MAJOR:
        return f"torch is built for CUDA {match[1]}; the stand-in implements CUDA {_CUDA_MAJOR}"
    if _headers() is None:
        return "no CUDA headers: they come with the package triton"
    return None


def build(cache: Path) -> Path:
    """The directory with the compiled libraries, built unless `cache` contains them.

    Args:
        cache: a directory for all versions; created if it does not exist. Several processes may
            build at once.

    Returns:
        A directory with `PRELOADED` and, in `DRIVER_DIRECTORY`, `libcuda.so.1`.

    Raises:
        RuntimeError: `why_not` has a reason, or the compiler fails.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(f"no phantom GPU: {reason}")
    directory = cache / f"libraries-{_key()}"
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=".libraries-", dir=cache))
    try:
        _compile(temporary)
        # Fails if another process was faster, with the same content.
        with suppress(OSError):
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _compile(target: Path) -> None:
    torch, headers = _package("torch"), _headers()
    assert torch is not None and headers is not None
    called = _undefined_symbols(torch / "lib" / "libtorch_cuda.so")
    _write_list(target / "phantom_blas_list.h", _blas_functions(called - _defined("blas.c")))
    declared = set(_driver_functions(headers / "cuda.h")) - _defined("driver.c")
    _write_list(target / "phantom_driver_list.h", (f"FUNCTION({name})" for name in declared))
    driver = target / DRIVER_DIRECTORY
    driver.mkdir()
    # -w: the generated functions have other parameters than the compiler knows for their names.
    common = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{target}"]
    preloaded = [str(_SOURCES / name) for name in ("runtime.c", "blas.c")]
    _gcc([*common, "-o", str(target / PRELOADED), *preloaded, "-lpthread"])
    library = driver / "libcuda.so.1"
    _gcc([*common, "-Wl,-soname,libcuda.so.1", "-o", str(library), str(_SOURCES / "driver.c")])
    # Triton's launcher is linked with -lcuda.
    (driver / "libcuda.so").symlink_to(library.name)


def _gcc(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr.strip()}")


def _key() -> str:
    """A hash of everything that determines the libraries."""
    digest = hashlib.sha256(platform.machine().encode())
    for name in (*_COMPILED, "build.py"):
        digest.update((_SOURCES / name).read_bytes())
    torch = _package("torch")
    assert torch is not None
    digest.update((torch / "version.py").read_bytes())
    return digest.hexdigest()[:16]


def _package(name: str) -> Path | None:
    """The directory of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _headers() -> Path | None:
    """A directory with the headers of the runtime and of the driver for `_CUDA_MAJOR`."""
    candidates = [Path("/usr/local/cuda/include")]
    if (triton := _package("triton")) is not None:
        candidates.insert(0, triton / "backends/nvidia/include")
    for directory in candidates:
        try:
            text = (directory / "cuda_runtime_api.h").read_text(errors="replace")
        except OSError:
            continue
        version = re.search(r"#define CUDART_VERSION\s+(\d+)", text)
        # The runtime's wheel lacks the compiler's headers, which these include.
        is_complete = all((directory / name).is_file() for name in ("cuda.h", "crt/host_defines.h"))
        if is_complete and version and int(version[1]) // 1000 == _CUDA_MAJOR:
            return directory
    return None


def _undefined_symbols(library: Path) -> set[str]:
    """Names of the functions that a library calls in others."""
    command = ["nm", "--dynamic", "--undefined-only", "--without-symbol-versions", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines() if line.strip()}


def _blas_functions(called: Iterable[str]) -> Iterator[str]:
    for name in called:
        if name.startswith("cublas"):
            is_product = "emm" in name.lower() or name == "cublasLtMatmul"
            yield f"{'PRODUCT' if is_product else 'FUNCTION'}({name})"


def _driver_functions(header: Path) -> set[str]:
    names = set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w*)\s*\(", header.read_text(errors="replace")))
    # A macro may rename a function to its second version, of which the header has no declaration.
    unversioned = {re.sub(r"_v\d+$", "", name) for name in names}
    return names | unversioned | {f"{name}_v2" for name in unversioned}


def _defined(source: str) -> set[str]:
    """Names of the functions that a file defines."""
    return set(re.findall(r"^int (\w+)\(", (_SOURCES / source).read_text(), re.MULTILINE))


def _write_list(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in sorted(lines)))

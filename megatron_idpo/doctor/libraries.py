"""Checks of the Python environment that work even if parts of it are broken.

A half-installed Transformer Engine makes `import megatron.core` crash, so nothing of megatron is
imported here: versions come from package metadata, paths from import specs, and imports are tried
in a child process. All access to the environment goes through `Probe`, which tests replace.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from megatron_idpo.doctor.finding import Finding, State
from megatron_idpo.mcore.model.families import FAMILIES

IMPORT_TIMEOUT_S = 300
"""Importing megatron-core takes about 10 s on two busy cores."""

_INSTALL_TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


class Probe:
    """Queries of the Python environment; nothing is imported into this process."""

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self) -> list[str]:
        """Requirements of this package without extras; empty if it is not installed."""
        try:
            lines = importlib.metadata.requires("megatron-idpo") or []
        except importlib.metadata.PackageNotFoundError:
            return []
        return [line for line in lines if "extra ==" not in line]

    def module_path(self, module: str) -> Path | None:
        """Path of a top-level module, without executing it."""
        spec = importlib.util.find_spec(module)
        if spec is None:
            return None
        location = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        path = Path(location or ".")
        return path.parent if path.name == "__init__.py" else path

    def import_failure(self, module: str) -> str | None:
        """Why a module cannot be imported in a new interpreter; None if it can."""
        command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"still importing after {IMPORT_TIMEOUT_S} s"
        if child.returncode == 0:
            return None
        message = (child.stderr.strip().splitlines() or [""])[-1]
        return (
            f"ended by signal {-child.returncode}; {message}" if child.returncode < 0 else message
        )


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch reports about itself."""

    version: str
    cuda_version: str | None
    has_gpu: bool
    nccl_version: str | None
    has_gloo: bool

    @classmethod
    def here(cls) -> "Torch | None":
        """The torch of this process; None if it cannot be imported."""
        try:
            import torch
            from torch import distributed
        except (ImportError, OSError):
            return None
        nccl = None
        if distributed.is_available() and distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return cls(
            version=torch.__version__,
            cuda_version=torch.version.cuda,
            has_gpu=torch.cuda.is_available(),
            nccl_version=nccl,
            has_gloo=distributed.is_available() and distributed.is_gloo_available(),
        )


def check_libraries(probe: Probe, torch: Torch | None) -> list[Finding]:
    """Every library that this package needs or can use, the most important first."""
    has_gpu = torch is not None and torch.has_gpu
    return [
        *_torch(torch),
        _requirements(probe),
        _megatron(probe),
        _transformer_engine(probe, has_gpu),
        _apex(probe, has_gpu),
        _flex_attention(probe, has_gpu),
        Finding("model families", State.OK, ", ".join(FAMILIES)),
    ]


def _torch(torch: Torch | None) -> list[Finding]:
    if torch is None:
        message, consequence = "cannot be imported", "everything needs it"
        return [Finding("torch", State.BROKEN, message, consequence, "reinstall torch")]
    return [Finding("torch", State.OK, torch.version), _cuda(torch), _collectives(torch)]


def _cuda(torch: Torch) -> Finding:
    if torch.has_gpu:
        return Finding("CUDA", State.OK, torch.cuda_version or "unknown version")
    consequence = "everything runs on the CPU, which suits tests, conversion and small models"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if is_hidden or not Path("/dev/nvidia0").exists():
        return Finding("CUDA", State.NOTE, "no GPU", consequence)
    build = f"for CUDA {torch.cuda_version}" if torch.cuda_version else "without CUDA"
    message = f"torch is built {build} and cannot use the GPU of this machine"
    remedy = "install the torch build that fits the driver (`nvidia-smi` shows its CUDA version), "
    remedy += 'or set CUDA_VISIBLE_DEVICES="" to use the CPU on purpose'
    return Finding("CUDA", State.BROKEN, message, "everything would run on the CPU", remedy)


def _collectives(torch: Torch) -> Finding:
    remedy = "install torch from PyPI, which includes both"
    backend = torch.nccl_version if torch.has_gpu else torch.has_gloo or torch.nccl_version
    if not backend:
        message = f"torch was built without {'NCCL' if torch.has_gpu else 'NCCL and gloo'}"
        return Finding("NCCL", State.BROKEN, message, "processes cannot communicate", remedy)
    version = torch.nccl_version if torch.has_gpu else None
    unused = "not used: without GPUs, processes communicate over gloo"
    return Finding("NCCL", State.OK, version or unused)


def _requirements(probe: Probe) -> Finding:
    """Every required package at a tested version."""
    name = "requirements"
    required = [Requirement(line) for line in probe.requirements()]
    required = [item for item in required if item.marker is None or item.marker.evaluate()]
    if not required:
        remedy = "install it with `pip install -e .`"
        return Finding(name, State.NOTE, "megatron-idpo is not installed", "", remedy)
    wrong = {}
    for item in required:
        version = probe.version(item.name)
        if version is None or not item.specifier.contains(version, prereleases=True):
            wrong[item] = f"{item.name} {version or 'missing'} (needs {item.specifier})"
    if not wrong:
        return Finding(name, State.OK, f"all {len(required)} in the tested range")
    message = ", ".join(wrong.values())
    consequence = "other versions are not tested; megatron-core changes its API in minor versions"
    remedy = f"pip install {' '.join(repr(str(item)) for item in wrong)}"
    return Finding(name, State.BROKEN, message, consequence, remedy)


def _megatron(probe: Probe) -> Finding:
    name, version = "megatron-core", probe.version("megatron-core")
    if version is None:
        remedy = "pip install megatron-core"
        return Finding(name, State.BROKEN, "not installed", "everything needs it", remedy)
    failure = probe.import_failure("megatron.core.models.gpt")
    if failure is None:
        return Finding(name, State.OK, version)
    message = f"{version}, but importing it fails: {failure}"
    consequence = "nothing can run; the usual reason is a half-installed library below"
    return Finding(name, State.BROKEN, message, consequence, "fix the libraries below first")


def _transformer_engine(probe: Probe, has_gpu: bool) -> Finding:
    name, install = "Transformer Engine", _INSTALL_TRANSFORMER_ENGINE
    if probe.module_path("transformer_engine") is None:
        if not has_gpu:
            return Finding(name, State.OK, "not installed", "not needed without a GPU")
        consequence = "it would speed up norms, fused with the linears after them (with LoRA in "
        consequence += "fp32 only), and Adam; results are the same"
        remedy = f"{install} (280 MB; compiling it takes about 20 minutes on 2 cores)"
        return Finding(name, State.MISSING, "not installed", consequence, remedy)
    version = probe.version("transformer-engine") or "of unknown version"
    if failure := probe.import_failure("transformer_engine.pytorch"):
        consequence = "`import megatron.core` crashes or builds models from mocks: it only handles "
        consequence += "a Transformer Engine that is completely absent"
        if not probe.module_path("transformer_engine_torch"):
            consequence += "; the extension `transformer_engine_torch` is not installed"
        remedy = f"complete it: {install}; or remove it: pip uninstall transformer-engine "
        remedy += "transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch"
        return Finding(
            name, State.BROKEN, f"{version}, half installed: {failure}", consequence, remedy
        )
    if has_gpu:
        return Finding(name, State.OK, version)
    consequence = "its modules need a GPU even to be built, so ours are used. Stock megatron-core "
    consequence += "fails here, because it takes Transformer Engine's norm for the final one"
    remedy = "nothing to do for megatron-idpo; uninstall it for other megatron-core scripts"
    return Finding(name, State.NOTE, f"{version}, not used", consequence, remedy)


def _apex(probe: Probe, has_gpu: bool) -> Finding:
    name, path = "apex", probe.module_path("apex")
    if path is None and not has_gpu:
        return Finding(name, State.OK, "not installed", "not needed without a GPU")
    if path is None:
        consequence = "it would speed up Adam and gradient norms; results are the same"
        remedy = "optional: build it from github.com/NVIDIA/apex (PyPI's `apex` is unrelated)"
        return Finding(name, State.MISSING, "not installed", consequence, remedy)
    if not (path / "optimizers").is_dir():
        message = "not NVIDIA's: PyPI's `apex` is for the Pyramid web framework"
        consequence = "megatron-core takes it for NVIDIA's and calls fused norms that it lacks"
        return Finding(name, State.BROKEN, message, consequence, "pip uninstall apex")
    if probe.module_path("amp_C") is None:
        message = "NVIDIA's, without its CUDA extensions"
        remedy = "rebuild it with --cpp_ext --cuda_ext, or uninstall it"
        return Finding(name, State.NOTE, message, "its fused kernels are not available", remedy)
    return Finding(name, State.OK, "NVIDIA's, with CUDA extensions")


def _flex_attention(probe: Probe, has_gpu: bool) -> Finding:
    name = "FlexAttention"
    if not has_gpu:
        return Finding(name, State.OK, "not used: on a CPU, attention runs pair by pair")
    if probe.module_path("triton") is None:
        consequence = "it compiles the attention over packed rows"
        remedy = "pip install triton"
        return Finding(name, State.BROKEN, "triton is not installed", consequence, remedy)
    return Finding(name, State.OK, f"compiled with triton {probe.version('triton')}")

"""What the doctor looks at in the Python environment, without being broken by what is broken there.

A half-installed Transformer Engine makes `import megatron.core` crash, so nothing of megatron is
imported here: versions come from package metadata, places from import specs, and whether something
can be imported is tried in a child process. `Probe` is the only way to the environment, so that
tests can pretend any.
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

IMPORT_TIMEOUT_S = 300
"""Importing megatron-core takes about 10 s on two busy cores."""


@dataclass(frozen=True, slots=True)
class ImportFailure:
    """How an import went wrong in a child process."""

    kind: str
    """The exception's class, or `crash` or `hang`."""

    message: str
    """The last line that the child wrote."""


class Probe:
    """Questions to this machine's Python environment; nothing is imported into this process."""

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self) -> list[str]:
        """What this package requires, extras excluded; empty if it is not installed itself."""
        try:
            lines = importlib.metadata.requires("megatron-idpo") or []
        except importlib.metadata.PackageNotFoundError:
            return []
        return [line for line in lines if "extra ==" not in line]

    def module_path(self, module: str) -> Path | None:
        """Where a top-level module is, without executing it."""
        spec = importlib.util.find_spec(module)
        if spec is None:
            return None
        location = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        path = Path(location or ".")
        return path.parent if path.name == "__init__.py" else path

    def import_failure(self, module: str) -> ImportFailure | None:
        """What happens when a fresh interpreter imports a module; None if it works."""
        command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return ImportFailure("hang", f"still importing after {IMPORT_TIMEOUT_S} s")
        if child.returncode == 0:
            return None
        message = next((line for line in reversed(child.stderr.splitlines()) if line.strip()), "")
        if child.returncode < 0:
            return ImportFailure("crash", f"ended by signal {-child.returncode}; {message}")
        return ImportFailure(message.partition(":")[0].rpartition(".")[2], message)


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says of itself, plain."""

    version: str
    cuda_version: str | None
    has_gpu: bool
    nccl_version: str | None
    has_gloo: bool

    @classmethod
    def here(cls) -> "Torch | None":
        """Of the torch that this process imports; None if it cannot."""
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


def examine_libraries(probe: Probe, torch: Torch | None) -> list[Finding]:
    """Everything that this package needs or can use, in the order of its importance."""
    has_gpu = torch is not None and torch.has_gpu
    return [
        _torch(torch),
        _cuda(torch),
        _collectives(torch),
        _requirements(probe),
        _megatron(probe),
        _transformer_engine(probe, has_gpu),
        _apex(probe, has_gpu),
        _flex_attention(probe, has_gpu),
        _flash_attention(probe, has_gpu),
    ]


def _torch(torch: Torch | None) -> Finding:
    if torch is None:
        return Finding(
            "torch", State.BROKEN, "cannot be imported", "everything needs it", "reinstall torch"
        )
    return Finding("torch", State.OK, torch.version)


def _cuda(torch: Torch | None) -> Finding:
    if torch is None or torch.has_gpu:
        version = None if torch is None else torch.cuda_version
        return Finding("CUDA", State.OK if version else State.NOTE, version or "unknown")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/dev/nvidia0").exists() and not hidden:
        message = (
            f"built for CUDA {torch.cuda_version}" if torch.cuda_version else "built without it"
        )
        return Finding(
            "CUDA",
            State.BROKEN,
            f"torch is {message} and cannot use the GPU of this machine",
            "everything would run on the CPU",
            "install the torch build that fits the driver (`nvidia-smi` names its CUDA version), "
            'or set CUDA_VISIBLE_DEVICES="" to run on the CPU on purpose',
        )
    return Finding(
        "CUDA",
        State.NOTE,
        "no GPU",
        "everything runs on the CPU: right for tests, conversion and small models; training "
        "larger ones wants GPUs",
    )


def _collectives(torch: Torch | None) -> Finding:
    if torch is None or not (torch.has_gloo or torch.nccl_version):
        return Finding(
            "NCCL",
            State.BROKEN,
            "torch has neither NCCL nor gloo",
            "processes cannot talk to each other",
            "install a torch build with torch.distributed",
        )
    if not torch.has_gpu:
        return Finding("NCCL", State.OK, "not used: processes talk over gloo")
    if torch.nccl_version is None:
        return Finding(
            "NCCL",
            State.BROKEN,
            "torch was built without it",
            "GPUs cannot talk to each other",
            "install torch from PyPI, which brings NCCL",
        )
    return Finding("NCCL", State.OK, torch.nccl_version)


def _requirements(probe: Probe) -> Finding:
    """Every required package, at a version that was tested."""
    required = [Requirement(line) for line in probe.requirements()]
    required = [one for one in required if one.marker is None or one.marker.evaluate()]
    if not required:
        remedy = "install it with `pip install -e .`, or `make test`"
        return Finding("requirements", State.NOTE, "megatron-idpo is not installed", "", remedy)
    versions = {one: probe.version(one.name) for one in required}
    wrong = [
        f"{one.name} {version or 'missing'} (needs {one.specifier})"
        for one, version in versions.items()
        if version is None or not one.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        names = " ".join(f"'{one}'" for one in required if one.name in " ".join(wrong))
        return Finding(
            "requirements",
            State.BROKEN,
            ", ".join(wrong),
            "other versions were not tested; megatron-core changes its interfaces in every minor",
            f"pip install {names}",
        )
    return Finding("requirements", State.OK, f"all {len(required)} in the tested range")


def _megatron(probe: Probe) -> Finding:
    version = probe.version("megatron-core")
    if version is None:
        remedy = "pip install megatron-core"
        return Finding(
            "megatron-core", State.BROKEN, "not installed", "everything needs it", remedy
        )
    failure = probe.import_failure("megatron.core.models.gpt")
    if failure is not None:
        return Finding(
            "megatron-core",
            State.BROKEN,
            f"{version}, but importing it fails: {failure.message}",
            "nothing can run; a half-installed library below is the usual reason",
            "mend what is broken below, then ask again",
        )
    return Finding("megatron-core", State.OK, version)


TE = "Transformer Engine"


def _transformer_engine(probe: Probe, has_gpu: bool) -> Finding:
    if probe.module_path("transformer_engine") is None:
        return _no_transformer_engine(has_gpu)
    version = probe.version("transformer-engine") or "of unknown version"
    failure = probe.import_failure("transformer_engine.pytorch")
    if failure is not None:
        extension = (
            ""
            if probe.module_path("transformer_engine_torch")
            else "its PyTorch extension `transformer_engine_torch` is not installed, and "
        )
        return Finding(
            TE,
            State.BROKEN,
            f"{version}, half installed: {failure.message}",
            f"{extension}megatron-core guards only against a Transformer Engine that is not there "
            "at all: with half of one, `import megatron.core` itself crashes or builds a model "
            "from mocks",
            "complete it: pip install --no-build-isolation 'transformer-engine[pytorch]'; or do "
            "without: pip uninstall transformer-engine transformer-engine-cu12 "
            "transformer-engine-cu13 transformer-engine-torch",
        )
    if not has_gpu:
        return Finding(
            TE,
            State.NOTE,
            f"{version}, left aside",
            "its modules need a GPU even to be built. Ours are used instead; stock megatron-core "
            "breaks here even with its local spec, because it takes Transformer Engine's norm for "
            "the final one",
            "nothing to do for megatron-idpo; uninstall it for other megatron-core scripts",
        )
    return Finding(TE, State.OK, version)


def _no_transformer_engine(has_gpu: bool) -> Finding:
    if not has_gpu:
        return Finding(TE, State.OK, "not installed", "nothing is lost: it needs a GPU")
    return Finding(
        TE,
        State.MISSING,
        "not installed",
        "norms and activations run unfused, a mixture of experts runs its experts one after "
        "another, and there is no FP8, no overlap of tensor-parallel communication and no varlen "
        "kernel for share_prompt: false",
        "pip install --no-build-isolation 'transformer-engine[pytorch]': 280 MB; where no built "
        "extension fits, compiling takes about 20 minutes on 2 cores",
    )


def _apex(probe: Probe, has_gpu: bool) -> Finding:
    path = probe.module_path("apex")
    if path is None:
        if not has_gpu:
            return Finding("apex", State.OK, "not installed", "nothing is lost: it needs a GPU")
        return Finding(
            "apex",
            State.MISSING,
            "not installed",
            "Adam is torch's own and, unless Transformer Engine is there, gradient norms are taken "
            "tensor by tensor; results are the same",
            "if it matters, build NVIDIA's from github.com/NVIDIA/apex; the PyPI package `apex` is "
            "something else",
        )
    if not (path / "optimizers").is_dir():
        version = probe.version("apex") or "of unknown version"
        return Finding(
            "apex",
            State.BROKEN,
            f"{version} is not NVIDIA's: PyPI's `apex` is a toolkit for the Pyramid web framework",
            "megatron-core believes that it is NVIDIA's and asks it for fused norms",
            "pip uninstall apex",
        )
    if probe.module_path("amp_C") is None:
        return Finding(
            "apex",
            State.NOTE,
            "NVIDIA's, without its CUDA extensions",
            "its fused optimizer and norms are not there, as if it were missing",
            "rebuild it with --cpp_ext --cuda_ext, or uninstall it",
        )
    return Finding("apex", State.OK, "NVIDIA's, with CUDA extensions")


def _flex_attention(probe: Probe, has_gpu: bool) -> Finding:
    name = "FlexAttention"
    if not has_gpu:
        return Finding(name, State.OK, "not used: rows are attended pair by pair on a CPU")
    if probe.module_path("triton") is None:
        return Finding(
            name,
            State.BROKEN,
            "triton is not installed",
            "attention over packed rows is compiled with it",
            "pip install triton",
        )
    return Finding(name, State.OK, f"compiled with triton {probe.version('triton')}")


def _flash_attention(probe: Probe, has_gpu: bool) -> Finding:
    version = probe.version("flash-attn")
    if version is not None and has_gpu:
        return Finding("flash-attn", State.OK, f"{version}, for Transformer Engine to choose")
    reason = "Transformer Engine brings cuDNN's" if has_gpu else "it needs a GPU"
    return Finding("flash-attn", State.OK, version or "not installed", f"nothing is lost: {reason}")

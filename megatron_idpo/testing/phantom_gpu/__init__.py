"""A CUDA device without a GPU: torch's CUDA path, executed on a CPU.

Two libraries written in C (`runtime.c` and `blas.c` preloaded, `driver.c` as `libcuda.so.1`) stand
in for CUDA. `torch.cuda.is_available()` is true, tensors are on `cuda:0`, torch's allocator,
dispatcher and streams are the real ones, and `torch.compile` compiles for an H100 with Triton and
ptxas. Device memory is host memory and kernels do nothing. With arithmetic (`arithmetic.py`) each
operator is carried out by torch's CPU kernel on the same memory, so results are right; without, a
step of a large layout takes seconds, and shows its memory, kernel launches and waits.

It finds missing transfers, tensors on the wrong device, operators and options that exist on one
device only, waits for the device, and memory. It cannot find errors in kernels, races between
streams, or what NCCL does differently from gloo; and it measures no GPU time.

    why_not()            the reason why it cannot run here, or None
    run(["train", ...])  the command line in subprocesses, on phantom GPUs
    device.phantom()     inside such a subprocess: the device, its counters and budgets

This module does not import torch.
"""

from megatron_idpo.testing.phantom_gpu.build import build, why_not
from megatron_idpo.testing.phantom_gpu.launch import Arithmetic, Ran, environment, run, run_python

__all__ = ["Arithmetic", "Ran", "build", "environment", "run", "run_python", "why_not"]

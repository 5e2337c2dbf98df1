"""Runs Megatron-LM's `megatron.training.pretrain` on a machine without a GPU.

In addition to megatron-core's CUDA calls (`redirect.py`), `megatron.training` asks for the
properties of a device and for its memory, compiles a dataset helper that its wheel lacks, and
refuses to start without CUDA. For tests and examples; the process cannot be used for anything else.
"""

import functools
import importlib
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

_CAPABILITY = (8, 0)
"""A GPU without FP8, so that `megatron.training` chooses nothing that needs a newer one."""

_MEMORY_FUNCTIONS = (
    "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
    "reset_peak_memory_stats empty_cache"
).split()


def redirect_pretrain_to_cpu() -> None:
    """Prepare this process for `pretrain()`; does nothing if CUDA is available.

    To be called before the script imports megatron. The script's own arguments remain the user's,
    among them `--distributed-backend gloo`.
    """
    if not redirect_cuda_to_cpu():
        return
    cuda: Any = torch.cuda
    major, minor = _CAPABILITY
    properties = SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=1 << 34, multi_processor_count=1
    )
    cuda.get_device_properties = lambda *_, **__: properties
    cuda.get_device_capability = lambda *_, **__: _CAPABILITY
    # Process groups are created only where there are devices, at least one per rank.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.memory_stats = lambda *_, **__: defaultdict(int)
    for name in _MEMORY_FUNCTIONS:
        setattr(cuda, name, lambda *_, **__: 0)
    initialize: Any = importlib.import_module("megatron.training.initialize")
    training: Any = importlib.import_module("megatron.training.training")
    # It runs make in megatron/core/datasets, where the wheel has no Makefile, and exits.
    initialize._compile_dependencies = torch.distributed.barrier
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    # It only compiles fused kernels in advance, which takes a C++ compiler most of a minute.
    training.set_jit_fusion_options = lambda **_: None

"""Collectives of phantom GPUs: gloo on the memory of CUDA tensors, or torch's fake process group.

gloo takes NCCL's place for processes that exist. The fake group belongs to one process that claims
a rank in a large world; its collectives leave their outputs as they are.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_map

from megatron_idpo.testing.phantom_gpu.arithmetic import on_host


@contextmanager
def gloo_for_nccl() -> Iterator[None]:
    """Process groups that ask for NCCL get gloo, within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernels of c10d are replaced on purpose
        _use_host_memory()
    init, new_group, barrier = dist.init_process_group, dist.new_group, dist.barrier
    object_device, over_cpu = distributed_c10d._get_object_coll_device, set[Any]()

    def gloo(backend: str | None) -> str | None:
        return "gloo" if backend == "nccl" else backend

    def init_gloo(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        device = kwargs.pop("device_id", None)
        if backend == "nccl":
            # Without it NCCL guesses, and each group connects anew.
            current = torch.device("cuda", torch.cuda.current_device())
            assert device == current, f"NCCL on {device}, but the current device is {current}"
        init(gloo(backend), *args, **kwargs)

    def new_gloo_group(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, *_: Any, **kwargs: Any
    ) -> Any:
        group = new_group(ranks, timeout=timeout, backend=gloo(backend), **kwargs)
        if backend == "gloo":
            over_cpu.add(group)
        return group

    def gloo_barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    def device_of_objects(group: Any = None) -> str:
        """Objects travel in CUDA tensors, as over NCCL, but not in groups that ask for gloo."""
        device: str = object_device(group) if group in over_cpu else "cuda"
        return device

    with ExitStack() as stack:
        stack.enter_context(patch.object(dist, "init_process_group", init_gloo))
        stack.enter_context(patch.object(dist, "new_group", new_gloo_group))
        stack.enter_context(patch.object(dist, "barrier", gloo_barrier))
        stack.enter_context(
            patch.object(distributed_c10d, "_get_object_coll_device", device_of_objects)
        )
        yield


@functools.cache
def _use_host_memory() -> torch.library.Library:
    """Give c10d's operators on CUDA tensors to gloo's on the CPU; for the life of the process."""
    library = torch.library.Library("c10d", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        has_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
        if schema.name.startswith("c10d::") and not schema.overload_name and has_tensors:
            name = schema.name.removeprefix("c10d::")
            library.impl(name, _on_host_memory(name), "CUDA", allow_override=True)
    return library


def _on_host_memory(name: str) -> Callable[..., Any]:
    collective = getattr(torch.ops.c10d, name).default

    def call(*args: Any, **kwargs: Any) -> Any:
        result = collective(*tree_map(on_host, args), **kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            # The outputs and the work to wait for. The caller gets its own tensors back.
            return args[0], result[1]
        return result

    return call


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which only this one exists, within the block.

    Objects that are gathered are this rank's, as often as there are ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group

    def fake_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *_: Any, **kwargs: Any
    ) -> Any:
        return new_group(ranks, backend="fake", **kwargs)

    def gather_own(outputs: list[Any], value: Any, group: Any = None) -> None:
        outputs[:] = [value] * len(outputs)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            patch.object(dist, "new_group", fake_group),
            patch.object(dist, "all_gather_object", gather_own),
            patch.object(dist, "broadcast_object_list", lambda *_, **__: None),
        ):
            yield
    finally:
        dist.destroy_process_group()

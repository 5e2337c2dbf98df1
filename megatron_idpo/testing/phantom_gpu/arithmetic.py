"""The arithmetic of a phantom GPU: torch's CPU kernels on the memory of CUDA tensors.

`HostArithmetic` sees every operator below autograd. It calls the operator on CUDA, which allocates
the result and launches kernels that do nothing, and then on CPU tensors that share the memory, and
copies the result. Views and allocations need nothing; operators whose result's shape depends on
values are computed on the CPU only.
"""

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten

_ALLOCATIONS = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.set_,
    _aten.resize_,
    _aten.record_stream,
    _aten.is_pinned,
    _aten._pin_memory,
    _aten._local_scalar_dense,  # a copy to the host, which is real
}
"""Operators whose CUDA implementation is complete without a kernel."""

_READS_VALUES = {
    _aten.bincount,
    _aten.equal,
    _aten.masked_select,
    _aten.nonzero,
    _aten.repeat_interleave,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
"""Operators that copy a size or a result to the host while they run."""

_NOT_COMPUTED = {"c10d", "_c10d_functional"}
"""Namespaces of collectives: `collectives.py`."""


def host_tensor(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a CUDA tensor, with its shape and strides.

    It is valid while the CUDA tensor's storage is.
    """
    storage = tensor.untyped_storage()
    if not storage.nbytes() or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory: Any = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    # Keeps the CUDA storage until the CPU tensor is gone, as gloo's threads need it.
    memory.storage = storage
    base = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    host = torch.empty(0, dtype=tensor.dtype)
    return host.set_(base, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_host(value: Any) -> Any:
    """An operator's argument for the CPU: `host_tensor` of CUDA tensors, the CPU as device."""
    if isinstance(value, Tensor):
        return host_tensor(value.detach()) if value.is_cuda else value.detach()
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, torch.Generator):
        return None  # see `_random_numbers`
    return value


class HostArithmetic(TorchDispatchMode):
    """Right results on phantom GPUs, within the block."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func.namespace == "c10d":
            _check_on_gpu(func, args)
        is_on_gpu = (
            isinstance(func, OpOverload)
            and func.namespace not in _NOT_COMPUTED
            and func.overloadpacket not in _ALLOCATIONS
            and any(_is_on_gpu(value) for value in tree_leaves((args, kwargs)))
        )
        if not is_on_gpu:
            return func(*args, **kwargs)
        # In inference mode, operators that are made of others arrive as a whole. Their parts have
        # to be computed one by one, because the next may depend on the values of the last. Also of
        # views: `reshape` and `contiguous` are views only if they need no copy.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func.is_view:
            return func(*args, **kwargs)
        # Before the call: an operator may replace the storage of its arguments.
        host_args, host_kwargs = tree_map(on_host, (list(args), dict(kwargs)))
        host_kwargs.pop("pin_memory", None)
        if _reads_values(func, args):
            return _computed_on_host_only(func, args, host_args, host_kwargs)
        with _random_numbers(func, args, kwargs):
            result = func(*args, **kwargs)
            computed = _compute(func, host_args, host_kwargs)
        for ours, theirs in zip(tree_leaves(result), tree_leaves(computed), strict=True):
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                _copy(func, ours, theirs)
        return result


def _check_on_gpu(func: OpOverload, args: Sequence[Any]) -> None:
    """gloo takes CPU tensors, but NCCL, for which it stands in, does not."""
    if "barrier" in func.name():  # its tensor has no meaning
        return
    for value in tree_leaves(args):
        if isinstance(value, Tensor) and not value.is_cuda:
            raise RuntimeError(f"{func}: no backend for device type cpu; NCCL takes CUDA tensors")


def _is_on_gpu(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_cuda
    return isinstance(value, torch.device) and value.type == "cuda"


def _copy(func: OpOverload, ours: Tensor, computed: Tensor) -> None:
    target = host_tensor(ours.detach()) if ours.is_cuda else ours
    assert target.shape == computed.shape, (
        f"{func}: {tuple(target.shape)} on CUDA, {tuple(computed.shape)} on the CPU"
    )
    # In-place operators, and those that return their argument, have computed in this memory.
    if target.numel() and target.data_ptr() != computed.data_ptr():
        target.copy_(computed)


def _reads_values(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the CUDA operator would read something from the device."""
    if func.overloadpacket in _READS_VALUES:
        return True
    is_indexing = func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_)
    masks = (torch.bool, torch.uint8)
    return is_indexing and any(isinstance(i, Tensor) and i.dtype in masks for i in args[1])


def _computed_on_host_only(
    func: OpOverload, args: Sequence[Any], host_args: Any, host_kwargs: Any
) -> Any:
    torch.cuda.current_stream().synchronize()  # as the CUDA operator would
    result = func(*host_args, **host_kwargs)
    if func._schema.is_mutable:
        return args[0]

    def to_device(value: Any) -> Any:
        return value.to("cuda", non_blocking=True) if isinstance(value, Tensor) else value

    return tree_map(to_device, result)


@contextmanager
def _random_numbers(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Random numbers of the CPU that are a function of the state of the CUDA generator.

    So the same state gives the same numbers, as on a GPU: dropout masks that are drawn again, ranks
    that share a generator. The CUDA operator advances its generator.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    generators = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Generator)]
    generator = (
        generators[0] if generators else torch.cuda.default_generators[torch.cuda.current_device()]
    )
    host = torch.default_generator
    before = host.get_state()
    if generator.device.type == "cuda":
        host.manual_seed(hash((generator.initial_seed(), generator.get_offset())) % 2**63)
    else:
        host.set_state(generator.get_state())
    try:
        yield
    finally:
        host.set_state(before)


# ---- operators that the CPU has in another form, or not at all ----------------------------------


def _compute(func: OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operator on the CPU.

    Raises:
        NotImplementedError: the CPU has no such operator, nor a decomposition of it.
    """
    packet = func.overloadpacket
    if packet in (_aten._softmax, _aten._log_softmax) and args[2]:
        return func(args[0].float(), args[1], False)  # 16 bits in, float32 out
    if packet in (_aten._softmax_backward_data, _aten._log_softmax_backward_data):
        grad, output, dim, input_dtype = args
        return func(grad, output, dim, grad.dtype).to(input_dtype)
    if packet in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm) and _has_out_dtype(func):
        return _widened_product(packet, args, kwargs)
    if packet is _aten.log_sigmoid_forward:
        # CUDA keeps no buffer for the backward pass.
        return func(*args)[0], args[0].new_empty(0)
    if packet is _aten.log_sigmoid_backward:
        args = [*args[:2], _aten.log_sigmoid_forward(args[1])[1]]
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        decomposition = _decompositions().get(func)
        if decomposition is None:
            raise
        with _disable_current_modes():
            return decomposition(*args, **kwargs)


def _has_out_dtype(func: OpOverload) -> bool:
    return "dtype" in func._overloadname


def _widened_product(packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A product of 16-bit operands with a float32 result, which the CPU cannot do directly."""
    *operands, dtype = args
    out = kwargs.pop("out", None)
    result = packet(*(operand.to(dtype) for operand in operands), **kwargs)
    return result if out is None else out.copy_(result)


@functools.cache
def _decompositions() -> Mapping[Any, Any]:
    from torch._decomp import global_decomposition_table

    table: Mapping[Any, Any] = global_decomposition_table["post_autograd"]
    return table

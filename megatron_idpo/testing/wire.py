"""Pickles that carry tensors as their own bytes, for `WorkerPool`'s pipes.

Why not plain `pickle`: it takes a view's whole storage along, and Megatron-Core replaces the
function that torch's tensor pickles name, so that reading one would import Megatron-Core. Why not
`torch.multiprocessing`: its tensors live in shared memory that the sender has to keep alive.

Torch is imported by the first tensor, not with this module: Megatron-Core's checkpoint writers
start processes that import the worker's modules and need none of it.

What it does not do: carry autograd graphs (a tensor arrives detached, `requires_grad` as it was),
or other devices than the CPU.
"""

import io
import pickle
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if "torch" not in sys.modules:
            return NotImplemented
        import torch

        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout != torch.strided:
            return NotImplemented
        bytes_of_it = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        is_parameter = type(obj) is torch.nn.Parameter
        described = (obj.dtype, tuple(obj.shape), obj.requires_grad, is_parameter)
        return _rebuild, (bytes_of_it.tobytes(), *described)


def _rebuild(
    data: bytes,
    dtype: "torch.dtype",
    shape: tuple[int, ...],
    requires_grad: bool,
    is_parameter: bool,
) -> "torch.Tensor":
    import torch

    if data:
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    else:
        tensor = torch.empty(shape, dtype=dtype)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def dumps(message: Any) -> bytes:
    """`message` as bytes; tensors, also inside containers, as compact copies."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The message that `dumps` made `data` of."""
    return pickle.loads(data)

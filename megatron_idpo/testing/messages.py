"""Messages between `WorkerPool` and its workers, and their serialization.

Over a Unix socket the pool asks the fork server for workers:

    pool -> server  `Fork` with two descriptors: the worker's end of its pipe, and the write end of
                    a pipe for its exit code
    server -> pool  the worker's pid; on that pipe, once the worker has ended, its exit code
    pool -> server  `Signal`, for a worker, or for it and its children

Over its duplex pipe a worker sends one `Outcome` for each `Call` that it receives; closing the pipe
ends the process. Arguments, results and exceptions travel inside as
bytes from `dumps`, so that a message can be read even if its contents cannot.

`dumps` pickles tensors as their own bytes. Plain `pickle` would include a view's whole storage, and
Megatron-Core replaces the function that torch's tensor pickles name, so that reading one would
import Megatron-Core. `torch.multiprocessing` keeps tensors in shared memory that the sender has to
keep alive. Not supported: autograd graphs (a tensor arrives detached, with its `requires_grad`),
and devices other than the CPU.

Separate from `fork_server.py`, because that module runs as `__main__`, where its classes would
differ from those that the pool imports. Torch is imported by the first tensor: Megatron-Core's
checkpoint writers start processes that import the server's modules and do not need torch.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SERVER_READY = b"ready"
"""Of the fork server, once it has imported torch and Megatron-Core."""

MESSAGE_BYTES = 1 << 16
"""More than any message over the socket has; a longer one would be cut."""


@dataclass(frozen=True)
class FunctionReference:
    """A module-level function, named so that another process can import it."""

    module: str
    path: str
    """The module's file: test modules are often importable by path only."""

    qualname: str

    def resolve(self) -> Callable[..., Any]:
        """Import the function's module, by name or else by path, and return the function."""
        value: Any = _load_module(self.module, self.path)
        for name in self.qualname.split("."):
            value = getattr(value, name)
        function: Callable[..., Any] = value
        return function


@dataclass(frozen=True)
class Call:
    """One rank's part of a `WorkerPool.run` or `run_as_program`."""

    function: FunctionReference
    arguments: bytes
    """Pickled `(args, kwargs)`, read only after the function's module is loaded."""

    rank: int
    world_size: int
    store: str
    """The rendezvous file, a new one for every call."""

    program_port: int | None
    """Of the rendezvous that the function joins itself, as a program; None: the worker joins."""

    timeout_s: float


@dataclass(frozen=True)
class Fork:
    """A request for a worker that writes its Python stack to the file `stacks` on SIGUSR1."""

    stacks: str


@dataclass(frozen=True)
class Signal:
    """A request to send a signal to a worker, if it has not ended."""

    pid: int
    number: int
    is_group: bool
    """Whether the processes that the worker started receive it, too."""


@dataclass(frozen=True)
class Outcome:
    """The result or the failure of one call."""

    result: bytes | None
    """The pickled result, or None if the call failed."""

    failed_at_s: float = 0.0
    """`time.monotonic()` of the failure: one clock for all processes of a machine."""

    exception: bytes | None = None
    """The pickled exception, or None if it cannot be pickled."""

    description: str = ""
    """The exception's type and message on one line."""

    traceback: str = ""


def dumps(message: Any) -> bytes:
    """`message` as bytes; tensors, also inside containers, as compact copies."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The inverse of `dumps`."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if "torch" not in sys.modules:
            return NotImplemented
        import torch

        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout != torch.strided:
            return NotImplemented
        values = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        is_parameter = type(obj) is torch.nn.Parameter
        metadata = (obj.dtype, tuple(obj.shape), obj.requires_grad, is_parameter)
        return _rebuild_tensor, (values.tobytes(), *metadata)


def _rebuild_tensor(
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


def _load_module(name: str, path: str) -> ModuleType:
    """Import module `name`, from `path` if the name does not lead to that file; cached."""
    if name == "__main__":
        # The caller's script: its `if __name__ == "__main__"` block must not run here.
        name = "__mp_main__"
    loaded = sys.modules.get(name)
    if loaded is not None and _is_same_file(getattr(loaded, "__file__", None), path):
        return loaded
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and _is_same_file(spec.origin, path):
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {name} from {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_same_file(first: str | None, second: str) -> bool:
    return first is not None and os.path.realpath(first) == os.path.realpath(second)

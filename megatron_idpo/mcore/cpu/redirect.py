"""Megatron-Core on a machine without a GPU: its CUDA calls, answered by the CPU.

What: Megatron-Core hard-codes CUDA (`device="cuda"`, `torch.cuda.current_device()`, streams, dtype
names, the CUDA generator). `redirect_cuda_to_cpu` replaces exactly those calls, each listed with
its reason in `_torch_patches`, `_cuda_patches` and `_megatron_patches`, so that the stock
schedules, DDP, distributed optimizer, sequence parallelism, RNG tracker, recomputation, MoE
dispatch and distributed checkpoints run over gloo.

Why patched functions and not a `TorchFunctionMode`: `Tensor.backward` runs with every such mode
switched off, so code that creates tensors during recomputation would still ask for a GPU.

What it does not do: pretend that a GPU is there. `torch.cuda.is_available()` stays False,
`Tensor.is_cuda` stays False, devices print as `cpu`, and code that never mentions CUDA sees the
same functions with the same results. Where CUDA is available nothing is touched. Kernels that
exist only as CUDA (Transformer Engine, fused softmax, CUDA graphs) are not replaced.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.jit import _builtins as torchscript_builtins
from torch.utils import _device as torch_device_context

from megatron_idpo.mcore.cpu import streams as cpu_streams
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)

_NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


@dataclass(frozen=True)
class Patch:
    """One redirected name: where it lives, what it becomes and why."""

    owner: Any
    """The module or class whose attribute is replaced."""

    name: str
    replacement: Any
    reason: str


_ABSENT = object()
_applied: list[tuple[Patch, Any]] = []
"""What is in force in this process, with the values to restore; a patched process is global."""


def redirect_cuda_to_cpu() -> bool:
    """Redirect Megatron-Core's CUDA calls to the CPU where there is no GPU.

    Idempotent, and it works before and after Megatron-Core is imported; it imports the
    Megatron-Core modules that it patches.

    Returns:
        True when the redirection is in force; False, with nothing touched, where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    if not _applied:
        # Megatron-Core first: it imports dynamo, which indexes torch's functions by identity and
        # has to see the originals. So do the functions that `with torch.device(...)` redirects.
        with suppress_megatron_warnings():
            megatron_patches = list(_megatron_patches())
        torch_device_context._device_constructors()
        _apply([*_torch_patches(), *_cuda_patches(), *megatron_patches])
        logging.getLogger(_RNG_LOGGER).addFilter(_is_not_rng_warning)
    return True


def is_redirected() -> bool:
    """Whether `redirect_cuda_to_cpu` is in force in this process."""
    return bool(_applied)


def restore_cuda() -> None:
    """Undo `redirect_cuda_to_cpu`, for tests; nothing happens if it is not in force."""
    while _applied:
        patch, original = _applied.pop()
        if original is _ABSENT:
            delattr(patch.owner, patch.name)
        else:
            setattr(patch.owner, patch.name, original)
    logging.getLogger(_RNG_LOGGER).removeFilter(_is_not_rng_warning)


def default_device() -> torch.device:
    """The device tensors of this process belong on: the current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def backend() -> str:
    """The torch.distributed backend for `default_device`: `"nccl"` or `"gloo"`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def _apply(patches: Iterable[Patch]) -> None:
    for patch in patches:
        # `vars`, not `getattr`: an inherited method (`Tensor.to`) is restored by deleting ours.
        original = vars(patch.owner).get(patch.name, _ABSENT)
        setattr(patch.owner, patch.name, patch.replacement)
        _applied.append((patch, original))


# --- torch: tensors that are asked for on CUDA -----------------------------------------------


def _torch_patches() -> Iterator[Patch]:
    tensor = torch.Tensor
    for name in _FACTORIES:
        original = getattr(torch, name)
        replacement = _on_cpu(original)
        # TorchScript knows builtins by identity, and would try to compile ours.
        if (builtin := torchscript_builtins._find_builtin(original)) is not None:
            torchscript_builtins._register_builtin(replacement, builtin)
        yield Patch(torch, name, replacement, 'schedules and optimizers pass device="cuda"')
    for name in _NEW_METHODS:
        original = getattr(tensor, name)
        yield Patch(tensor, name, _on_cpu(original), 'takes device="cuda" like the factories')
    yield Patch(tensor, "to", _to_on_cpu(tensor.to), 'optimizer and checkpoint code: .to("cuda")')
    yield Patch(tensor, "cuda", _cuda_on_cpu, "embeddings, grad scaler, exchange: .cuda()")
    yield Patch(
        tensor,
        "type",
        _type_on_cpu(tensor.type),
        "optimizers sort parameters by comparing type() with torch.cuda.*Tensor",
    )


def _is_cuda(device: object) -> bool:
    """Whether a device argument means a GPU: `"cuda:1"`, `torch.device("cuda")`, or an index."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu[**P, R](original: Callable[P, R]) -> Callable[P, R]:
    """`original` with a CUDA `device=` replaced by the CPU."""

    @functools.wraps(original)
    def redirected(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return redirected


def _to_on_cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`Tensor.to`, whose device may also be the first positional argument."""

    @functools.wraps(original)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return redirected


def _cuda_on_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda`: the tensor itself, as `.cuda()` gives for one that is on the GPU already."""
    return self.cpu()


class _TypeName(str):
    """A tensor type's name that also answers to its CUDA twin's.

    `"torch.FloatTensor"` for everybody who prints or compares it, and equal to
    `"torch.cuda.FloatTensor"` for the optimizers that accept nothing else.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or str(self).replace("torch.", "torch.cuda.", 1) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return (str, (str(self),))


def _type_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    return redirected


# --- torch.cuda: devices, streams, generator -------------------------------------------------


def _cuda_patches() -> Iterator[Patch]:
    cuda = torch.cuda
    yield Patch(cuda, "current_device", lambda: CPU, "the device of most new tensors")
    yield Patch(cuda, "set_device", _nothing(), "launch scripts call it with the local rank")
    yield Patch(cuda, "synchronize", _nothing(), "the CPU computes in order")
    yield Patch(cuda, "Stream", cpu_streams.Stream, "DDP, MoE and checkpoints overlap on streams")
    yield Patch(cuda, "Event", cpu_streams.Event, "timers and stream ordering")
    yield Patch(cuda, "current_stream", cpu_streams.current_stream, "the only stream there is")
    yield Patch(cuda, "stream", cpu_streams.stream, "work on a side stream runs here and now")
    generator = "dropout on CPU tensors draws from the CPU generator"
    yield Patch(cuda, "get_rng_state", _get_rng_state, generator)
    yield Patch(cuda, "set_rng_state", _set_rng_state, generator)
    yield Patch(cuda, "manual_seed", _manual_seed, generator)


def _nothing() -> Callable[..., None]:
    """A function that does nothing, another one each time.

    torch.compile keeps a table from functions to rules and stops when one function stands in it
    under two names with different rules.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return nothing


def _get_rng_state(device: Any = "cuda", **kwargs: Any) -> torch.Tensor:
    """The CPU generator's state."""
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda", **kwargs: Any) -> None:
    """Set the CPU generator's state."""
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    """Seed the CPU generator."""
    torch.default_generator.manual_seed(int(seed))


# --- megatron.core: names that are bound at import, and tests of is_cuda ----------------------

_RNG_LOGGER = "megatron.core.tensor_parallel.random"


def _megatron_patches() -> Iterator[Patch]:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    # Imported for their warnings, which nobody should hear later either.
    importlib.import_module("megatron.core.optimizer")
    importlib.import_module("megatron.core.models.gpt")

    generator = "reaches torch.cuda's generators through names bound at import"
    yield Patch(random, "_get_cuda_rng_state", _get_rng_state, generator)
    yield Patch(random, "_set_cuda_rng_state", _set_rng_state, generator)
    splits = "tests Tensor.is_cuda and would leave tensors where lists of split sizes are needed"
    yield Patch(dispatcher, "maybe_move_tensor_to_cpu", _moved_to_cpu, splits)


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu` for tensors that are there already."""
    if as_numpy and isinstance(tensor, torch.Tensor):
        return tensor.numpy()
    return tensor


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    """Drop the tracker's complaint that a fork moved the CPU generator: here it is the one."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

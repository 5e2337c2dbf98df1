"""Runs Megatron-Core on a machine without a GPU by redirecting its CUDA calls to the CPU.

Megatron-Core hard-codes CUDA (`device="cuda"`, `torch.cuda.current_device()`, streams, dtype names,
the CUDA generator). `redirect_cuda_to_cpu` patches exactly those calls, each listed with its reason
in `_torch_patches`, `_cuda_patches` and `_megatron_patches`. The stock schedules, DDP, distributed
optimizer, sequence parallelism, RNG tracker, recomputation, MoE dispatch and distributed
checkpoints then run over gloo.

Functions are patched instead of using a `TorchFunctionMode`, because `Tensor.backward` disables all
such modes: code that creates tensors during recomputation would still request a GPU.

It does not fake a GPU. `torch.cuda.is_available()` and `Tensor.is_cuda` stay False, devices print
as `cpu`, and code that does not mention CUDA gets the same results as before. If CUDA is available,
nothing is patched. Kernels that exist only for CUDA (Transformer Engine, fused softmax, CUDA
graphs) are not replaced.
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
from megatron_idpo.mcore.cpu.uneven import gather_uneven, reduce_scatter_uneven
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

CPU = torch.device("cpu")

_FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace "
    "ones ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor "
    "tensor tril_indices triu_indices zeros zeros_like"
).split()

_NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


@dataclass(frozen=True)
class Patch:
    """One patched attribute, its replacement and the reason."""

    owner: Any
    """The module or class whose attribute is replaced."""

    name: str
    replacement: Any
    reason: str


_ABSENT = object()
_applied: list[tuple[Patch, Any]] = []
"""The active patches with the original values; global, like the patched attributes."""


def redirect_cuda_to_cpu() -> bool:
    """Redirect Megatron-Core's CUDA calls to the CPU if there is no GPU.

    Idempotent. Works before or after Megatron-Core is imported, and imports the Megatron-Core
    modules that it patches.

    Returns:
        Whether the redirection is active; False, with nothing patched, if CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    if not _applied:
        # Order matters: import Megatron-Core before patching torch. It imports dynamo, which
        # indexes torch's functions by identity and must see the originals. For the same reason,
        # fill torch's cached set of functions that `with torch.device(...)` redirects.
        with suppress_megatron_warnings():
            megatron_patches = list(_megatron_patches())
        torch_device_context._device_constructors()
        _apply([*_torch_patches(), *_cuda_patches(), *megatron_patches])
        logging.getLogger(_RNG_LOGGER).addFilter(_is_not_rng_warning)
    return True


def is_redirected() -> bool:
    """Whether the redirection is active in this process."""
    return bool(_applied)


def restore_cuda() -> None:
    """Undo `redirect_cuda_to_cpu`; does nothing if it is not active. For tests."""
    # In reverse order, in case two patches change the same attribute.
    while _applied:
        patch, original = _applied.pop()
        if original is _ABSENT:
            delattr(patch.owner, patch.name)
        else:
            setattr(patch.owner, patch.name, original)
    logging.getLogger(_RNG_LOGGER).removeFilter(_is_not_rng_warning)


def default_device() -> torch.device:
    """The device for this process's tensors: the current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device without waiting for it: to a GPU out of pinned memory.

    torch keeps the pinned memory until the copy has ended.
    """
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def backend() -> str:
    """The torch.distributed backend for `default_device`: `"nccl"` or `"gloo"`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def _apply(patches: Iterable[Patch]) -> None:
    for patch in patches:
        # `vars`, not `getattr`: `Tensor.to` is inherited, and restored by deleting the override.
        original = vars(patch.owner).get(patch.name, _ABSENT)
        setattr(patch.owner, patch.name, patch.replacement)
        _applied.append((patch, original))


# --- torch: tensors created on or moved to CUDA ----------------------------------------------


def _torch_patches() -> Iterator[Patch]:
    tensor = torch.Tensor
    for name in _FACTORIES:
        original = getattr(torch, name)
        replacement = _on_cpu(original)
        # TorchScript recognizes builtins by identity; without this it would try to compile ours.
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
    """Whether a device argument is a GPU: `"cuda:1"`, `torch.device("cuda")`, or an index."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu[**P, R](original: Callable[P, R]) -> Callable[P, R]:
    """Wraps `original` to replace a CUDA `device=` by the CPU and pinned memory by ordinary."""

    @functools.wraps(original)
    def redirected(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # Only a CUDA driver can pin memory; rotary positions under context parallelism ask for it.
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return redirected


def _to_on_cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps `Tensor.to`, which also takes the device as first positional argument."""

    @functools.wraps(original)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return redirected


def _cuda_on_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda`: the tensor itself, like `.cuda()` of a tensor that is on the GPU."""
    return self.cpu()


class _TypeName(str):
    """A CPU tensor type's name that also equals the name of the CUDA type.

    Prints and hashes as `"torch.FloatTensor"`, but compares equal to `"torch.cuda.FloatTensor"`
    too, the only name that megatron-core's optimizers accept.
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
    yield Patch(cuda, "synchronize", _nothing(), "the CPU executes in program order")
    yield Patch(cuda, "Stream", cpu_streams.Stream, "DDP, MoE and checkpoints overlap on streams")
    yield Patch(cuda, "Event", cpu_streams.Event, "timers and stream ordering")
    yield Patch(cuda, "current_stream", cpu_streams.current_stream, "a CPU has one stream")
    yield Patch(cuda, "stream", cpu_streams.stream, "work on a side stream runs in program order")
    generator = "dropout on CPU tensors draws from the CPU generator"
    yield Patch(cuda, "get_rng_state", _get_rng_state, generator)
    yield Patch(cuda, "set_rng_state", _set_rng_state, generator)
    yield Patch(cuda, "manual_seed", _manual_seed, generator)


def _nothing() -> Callable[..., None]:
    """A new function that does nothing.

    New on each call: torch.compile maps functions to tracing rules, and fails if one function has
    two names with different rules.
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


# --- megatron.core: names bound at import, and checks of is_cuda -------------------------------

_RNG_LOGGER = "megatron.core.tensor_parallel.random"


def _megatron_patches() -> Iterator[Patch]:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    # Imported here so that their import warnings are suppressed too.
    importlib.import_module("megatron.core.optimizer")
    importlib.import_module("megatron.core.models.gpt")

    generator = "reaches torch.cuda's generators through names bound at import"
    yield Patch(random, "_get_cuda_rng_state", _get_rng_state, generator)
    yield Patch(random, "_set_cuda_rng_state", _set_rng_state, generator)
    splits = "checks Tensor.is_cuda, and would return tensors where lists of sizes are needed"
    yield Patch(dispatcher, "maybe_move_tensor_to_cpu", _moved_to_cpu, splits)
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    for name, uneven in (
        ("_gather_along_first_dim", gather_uneven),
        ("_reduce_scatter_along_first_dim", reduce_scatter_uneven),
    ):
        replacement = uneven(getattr(mappings, name))
        yield Patch(mappings, name, replacement, "needs parts of different sizes, unlike gloo")


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu` for tensors that are already on the CPU."""
    if as_numpy and isinstance(tensor, torch.Tensor):
        return tensor.numpy()
    return tensor


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    """Drops the tracker's warning that a fork changed the CPU generator: here that is intended."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

"""PEFT's adapters of families whose Hugging Face modules fuse projections (`qkv_proj`).

Here each projection has an adapter, as in every family. In PEFT the fused module has one, which is
the same as adapters of rank r on its m projections if its rank is m r: A stacks the projections' A,
and B is block-diagonal,

    [B_q  0   0 ]   [A_q]
    [ 0  B_k  0 ] · [A_k]
    [ 0   0  B_v]   [A_v]

PEFT's files have one rank and one alpha, so that the adapters of all modules get the largest m r,
with zeros, and alpha grows so that alpha / r, or alpha / sqrt(r), is the same. An adapter that PEFT
trained is read at its rank: the projections of a module start with the same A.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.lora import PROJECTIONS, LoraConfig
from megatron_idpo.convert.families import FUSED_MODULES
from megatron_idpo.errors import CheckpointError, Problem
from megatron_idpo.mcore.model.architecture import Architecture

_ALL_MODULES = {
    module: projections
    for modules in FUSED_MODULES.values()
    for module, projections in modules.items()
}


@dataclass(frozen=True, slots=True)
class Module:
    """A Hugging Face module, and the adapted projections in it."""

    name: str
    projections: tuple[str, ...]
    """All of them, in the order of its rows."""

    targets: tuple[str, ...]
    """Those with an adapter."""


def architecture_fuses(architecture: Architecture) -> bool:
    """Whether Hugging Face's modules of this family fuse projections."""
    return architecture.family in FUSED_MODULES


def modules_of(settings: LoraConfig, architecture: Architecture) -> list[Module]:
    """The modules with an adapter, in the order of `PROJECTIONS`."""
    fused = FUSED_MODULES.get(architecture.family, {})
    parent = {name: module for module, names in fused.items() for name in names}
    targets: dict[str, list[str]] = {}
    for projection in settings.projections:
        targets.setdefault(parent.get(projection, projection), []).append(projection)
    return [Module(name, fused.get(name, (name,)), tuple(own)) for name, own in targets.items()]


def incomplete_modules(settings: LoraConfig, architecture: Architecture) -> list[Problem]:
    """Modules of which only some projections are targets: PEFT's adapter would be of all."""
    return [
        Problem(
            "lora.targets",
            f"has {', '.join(module.targets)} alone, but {module.name} of this "
            f"{architecture.family} model fuses {', '.join(module.projections)}",
            "name all of them, or none",
        )
        for module in modules_of(settings, architecture)
        if len(module.targets) < len(module.projections)
    ]


def projections_of(target: str) -> tuple[str, ...]:
    """The projections of an entry of PEFT's `target_modules`."""
    return _ALL_MODULES.get(target, (target,))


def module_names_of(projection: str) -> list[str]:
    """The names that a projection's module may have in `exclude_modules`."""
    fused = [name for name, projections in _ALL_MODULES.items() if projection in projections]
    return [projection, *fused]


def file_settings(settings: LoraConfig, architecture: Architecture) -> LoraConfig:
    """Rank and alpha as PEFT's file has them."""
    growths = [len(module.targets) for module in modules_of(settings, architecture)]
    growth = max(growths, default=1)
    if growth == 1:
        return settings
    alpha = settings.alpha * (math.sqrt(growth) if settings.rslora else growth)
    return settings.model_copy(update={"rank": settings.rank * growth, "alpha": alpha})


def stacked(
    tensors: Iterable[tuple[int, str, str, Tensor]],
    settings: LoraConfig,
    architecture: Architecture,
) -> Iterator[tuple[int, str, str, Tensor]]:
    """Whole A and B of modules from those of projections: layer, module, side, tensor.

    Args:
        tensors: layer, projection, side and tensor, those of a module in succession.
        settings: of the adapters.
        architecture: of the model.
    """
    modules = modules_of(settings, architecture)
    rank = file_settings(settings, architecture).rank
    module_of = {target: module for module in modules for target in module.targets}
    waiting: dict[str, Tensor] = {}
    for layer, projection, side, tensor in tensors:
        module = module_of[projection]
        if rank == settings.rank:
            yield layer, module.name, side, tensor
            continue
        waiting[projection + side] = tensor
        if len(waiting) == 2 * len(module.targets):
            down = torch.cat([waiting[f"{name}A"] for name in module.targets])
            missing = rank - len(down)  # of a module with fewer projections
            yield layer, module.name, "A", torch.nn.functional.pad(down, (0, 0, 0, missing))
            up = torch.block_diag(*(waiting[f"{name}B"] for name in module.targets))
            yield layer, module.name, "B", torch.nn.functional.pad(up, (0, missing))
            waiting.clear()
    assert not waiting, f"incomplete: {sorted(waiting)}"


def first_row(module: Module, projection: str, architecture: Architecture) -> int:
    """Where a projection's rows begin in its module."""
    before = module.projections[: module.projections.index(projection)]
    return sum(_rows(name, architecture) for name in before)


def _rows(projection: str, architecture: Architecture) -> int:
    return architecture.projection_shape(projection)[0]


def block_of(module: Module, projection: str, settings: LoraConfig, file_rank: int) -> slice:
    """The part of a file's rank that belongs to a projection.

    All of it if the file has the adapters' rank: then the projections of a module share its A.
    """
    if file_rank == settings.rank:
        return slice(0, file_rank)
    first = module.targets.index(projection) * settings.rank
    return slice(first, first + settings.rank)


def check_blocks(location: str, up: Tensor, block: slice) -> None:
    """Check that B's rows of a projection are zero outside its block.

    Raises:
        CheckpointError: they are not: an adapter of this rank that is not a stack of adapters.
    """
    outside = up.clone()
    outside[:, block] = 0
    if outside.any():
        message = "its rank is a multiple of lora.rank, but it is not a stack of such adapters"
        raise CheckpointError.at(location, message, "set lora.rank to the adapter's rank")


def same_but_stacked(saved: LoraConfig, current: LoraConfig, modules: Any) -> LoraConfig:
    """A file's settings with the rank of the adapters it is a stack of, if it may be one.

    Args:
        saved: as the file has them.
        current: of the adapters.
        modules: `target_modules` of the file.
    """
    fused = [_ALL_MODULES.get(str(name), ()) for name in modules or () if isinstance(modules, list)]
    growth, rest = divmod(saved.rank, current.rank)
    if rest or growth < 2 or growth != max(map(len, fused), default=1):
        return saved
    alpha = saved.alpha / (math.sqrt(growth) if saved.rslora else growth)
    if not math.isclose(alpha, current.alpha):
        return saved
    return saved.model_copy(update={"rank": current.rank, "alpha": current.alpha})


def all_projections(targets: Any) -> Any:
    """`target_modules` with fused modules replaced by their projections."""
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        return targets
    names = {name for target in targets for name in projections_of(str(target))}
    known = [name for name in PROJECTIONS if name in names]
    return known + sorted(names - set(PROJECTIONS))

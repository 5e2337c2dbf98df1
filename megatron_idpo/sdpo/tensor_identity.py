"""What tells a model in memory from every other: a hash that is the same in every layout."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.world import gathered


def tensors_identity(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of names.

    Collective over the world: an all-gather of one small object, after this rank has run through
    its tensors, whose making may be collective over its model-parallel groups.

    Args:
        tensors: whole ones under global names; each from one rank of a data-parallel replica. Those
            of other replicas than the first are not looked at.
    """
    mine: dict[str, str] = {}
    if this_rank().data == 0:
        for name, tensor in tensors:
            mine[name] = f"{name} {tensor.dtype} {tuple(tensor.shape)} {_digest(tensor)}\n"
    everywhere = {name: message for part in gathered(mine) for name, message in part.items()}
    total = hashlib.sha256()
    for name in sorted(everywhere):
        total.update(everywhere[name].encode())
    return total.hexdigest()


def _digest(tensor: Tensor) -> str:
    """sha256 over the values' bytes, row after row."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).hexdigest()

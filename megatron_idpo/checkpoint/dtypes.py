"""Dtypes of checkpoints: which one a conversion writes, and which casts are valid."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_idpo.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes a model can have, by their names in the command line and the configuration."""


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in DTYPES:
        raise ConfigError.at("dtype", f"unknown dtype {name!r}", f"use {', '.join(DTYPES)}")
    return DTYPES[name]


def stored_dtype(location: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The one dtype of all tensors of a checkpoint.

    Args:
        location: for errors: the checkpoint directory.
        dtypes: tensor name -> dtype.

    Raises:
        CheckpointError: there are several (converting would silently change some), or it is not a
            dtype of models, such as FP8.
    """
    kinds = sorted(set(dtypes.values()), key=str)
    remedy = f"choose one with --dtype {'|'.join(DTYPES)}"
    if len(kinds) > 1:
        first, second = (
            next(name for name in dtypes if dtypes[name] == kind) for kind in kinds[:2]
        )
        message = f"mixed dtypes: {first} is {kinds[0]} and {second} is {kinds[1]}"
        raise CheckpointError.at(location, message, remedy)
    if kinds[0] not in DTYPES.values():
        raise CheckpointError.at(location, f"the dtype {kinds[0]} is not supported", remedy)
    return kinds[0]


def check_floating(location: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Checks that every tensor is stored as floating-point numbers.

    Args:
        location: for errors: the checkpoint directory.
        dtypes: tensor name -> dtype.

    Raises:
        CheckpointError: one is not. Integers are codes of a quantized model: cast to floats, they
            would be wrong weights without any error.
    """
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            message = f"tensor {name!r} is stored as {dtype}, not as floating point"
            raise CheckpointError.at(location, message, "dequantize it first")


def check_range(location: str, name: str, cast: Tensor, stored: torch.dtype) -> None:
    """Checks that a tensor has no infinities after a cast to a dtype of smaller range.

    Args:
        location: for errors: a file or directory.
        name: of the tensor.
        cast: some or all of its values, in the new dtype.
        stored: the previous dtype.

    Raises:
        CheckpointError: a value is too large for the new dtype.
    """
    largest = torch.finfo(cast.dtype).max
    if largest < torch.finfo(stored).max and bool(cast.isinf().any()):
        raise CheckpointError.at(
            location,
            f"tensor {name!r} has values that are infinite in {cast.dtype} (largest {largest:g})",
            f"keep {stored}, or choose bf16 or fp32",
        )

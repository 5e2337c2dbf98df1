"""Which number format a conversion works in: the checkpoint's own, unless another is asked for."""

from collections.abc import Mapping

import torch

from megatron_idpo.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats a model can have, by the names of the command line and the configuration."""


def parse_dtype(name: str) -> torch.dtype:
    """The format called `name`.

    Raises:
        ConfigError: no such format.
    """
    if name not in DTYPES:
        raise ConfigError.at("dtype", f"{name!r} is no model format", f"use {', '.join(DTYPES)}")
    return DTYPES[name]


def stored_dtype(location: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The one format that all tensors of a checkpoint are stored in.

    Args:
        location: what to name in errors, a directory.
        dtypes: the format of each tensor.

    Raises:
        CheckpointError: several formats (converting would silently change some), or one that is no
            model format, such as FP8.
    """
    found = sorted(set(dtypes.values()), key=str)
    remedy = f"choose one with --dtype {'|'.join(DTYPES)}"
    if len(found) > 1:
        first, second = (
            next(name for name in dtypes if dtypes[name] == kind) for kind in found[:2]
        )
        raise CheckpointError.at(
            location, f"{first} is {found[0]} and {second} is {found[1]}: formats are mixed", remedy
        )
    if found[0] not in DTYPES.values():
        raise CheckpointError.at(location, f"the tensors are {found[0]}, no model format", remedy)
    return found[0]

"""Whether weights can be cast: what is no float cannot, and what becomes infinite must not.

Asked by both converters, of what they read from Hugging Face's files and from megatron-core's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_idpo.errors import CheckpointError


def check_floating(location: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Every tensor is stored as floating-point numbers.

    Args:
        location: what to name in errors, a directory.
        dtypes: the stored format of each tensor.

    Raises:
        CheckpointError: one is not. Integers are codes of a quantised model; cast to floats, they
            would be garbage without anybody being told.
    """
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise CheckpointError.at(
                location, f"tensor {name!r} is stored as {dtype}, no floats", "dequantise it first"
            )


def check_range(location: str, name: str, cast: Tensor, stored: torch.dtype) -> None:
    """A tensor has no infinities after a cast to a format of smaller range.

    Args:
        location: what to name in errors, a file or directory.
        name: of the tensor.
        cast: some or all of its values, in the new format.
        stored: the format they had.

    Raises:
        CheckpointError: a value is too large for the new format.
    """
    largest = torch.finfo(cast.dtype).max
    if largest < torch.finfo(stored).max and bool(cast.isinf().any()):
        raise CheckpointError.at(
            location,
            f"tensor {name!r} has values that are infinite in {cast.dtype} (largest {largest:g})",
            f"keep {stored}, or choose bf16 or fp32",
        )

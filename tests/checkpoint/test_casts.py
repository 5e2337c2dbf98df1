"""What cannot be cast, and values that a cast would make infinite."""

import pytest
import torch

from megatron_idpo.checkpoint.dtype_checks import check_floating, check_range
from megatron_idpo.errors import CheckpointError

FLOATS = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float8_e4m3fn}


def test_floats_of_any_kind_can_be_cast():
    check_floating("here", FLOATS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_codes_are_refused_with_their_tensor(dtype):
    message = rf"^here: tensor 'w' is stored as {dtype}, no floats; dequantise it first$"
    with pytest.raises(CheckpointError, match=message):
        check_floating("here", FLOATS | {"w": dtype})


OVERFLOWS = [
    (torch.float32, torch.float16, 65520.0),
    (torch.bfloat16, torch.float16, -70000.0),
    (torch.float32, torch.bfloat16, 3.4e38),
]


@pytest.mark.parametrize(("stored", "wanted", "value"), OVERFLOWS)
def test_a_value_that_becomes_infinite_is_refused(stored, wanted, value):
    weight = torch.tensor([1.0, value], dtype=stored)
    with pytest.raises(CheckpointError, match=rf"here: tensor 'w' .* infinite in {wanted}"):
        check_range("here", "w", weight.to(wanted), stored)
    check_range("here", "w", weight[:1].to(wanted), stored)


def test_what_was_infinite_before_is_not_looked_at():
    weight = torch.tensor([torch.inf], dtype=torch.float16)
    check_range("here", "w", weight, torch.float16)
    check_range("here", "w", weight.float(), torch.float16)

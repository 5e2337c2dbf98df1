"""Dtypes by name, the dtype of a checkpoint, and casts that are refused."""

import pytest
import torch

from megatron_idpo.checkpoint.dtypes import check_floating, check_range, parse_dtype, stored_dtype
from megatron_idpo.errors import CheckpointError, ConfigError

FLOATS = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_known_names_are_parsed(name, dtype):
    assert parse_dtype(name) == dtype


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="dtype: unknown dtype 'fp8'; use fp32, bf16, fp16"):
        parse_dtype("fp8")


def test_uniform_dtype_is_returned():
    assert stored_dtype("here", {"a": torch.bfloat16, "b": torch.bfloat16}) == torch.bfloat16


def test_mixed_dtypes_are_refused_with_a_tensor_of_each():
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32}
    message = r"here: mixed dtypes: b is torch.bfloat16 and a is torch.float32; .*--dtype fp32\|"
    with pytest.raises(CheckpointError, match=message):
        stored_dtype("here", dtypes)


def test_unsupported_dtype_is_refused():
    message = r"here: the dtype torch.float8_e4m3fn is not supported; choose one with --dtype"
    with pytest.raises(CheckpointError, match=message):
        stored_dtype("here", {"a": torch.float8_e4m3fn})


def test_floating_point_is_accepted():
    check_floating("here", FLOATS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integer_tensor_is_refused(dtype):
    message = (
        rf"^here: tensor 'w' is stored as {dtype}, not as floating point; dequantize it first$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_floating("here", FLOATS | {"w": dtype})


OVERFLOWS = [
    (torch.float32, torch.float16, 65520.0),
    (torch.bfloat16, torch.float16, -70000.0),
    (torch.float32, torch.bfloat16, 3.4e38),
]


@pytest.mark.parametrize(("stored", "dtype", "value"), OVERFLOWS)
def test_overflowing_cast_is_refused(stored, dtype, value):
    weight = torch.tensor([1.0, value], dtype=stored)
    with pytest.raises(CheckpointError, match=rf"here: tensor 'w' .* infinite in {dtype}"):
        check_range("here", "w", weight.to(dtype), stored)
    check_range("here", "w", weight[:1].to(dtype), stored)


def test_values_that_were_infinite_are_accepted():
    weight = torch.tensor([torch.inf], dtype=torch.float16)
    check_range("here", "w", weight, torch.float16)
    check_range("here", "w", weight.float(), torch.float16)

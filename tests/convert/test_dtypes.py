"""Formats by name, and the one format that a checkpoint is stored in."""

import pytest
import torch

from megatron_idpo.convert.hf_io.dtypes import parse_dtype, stored_dtype
from megatron_idpo.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_names(name, dtype):
    assert parse_dtype(name) == dtype


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="dtype: 'fp8' is no model format; use fp32, bf16, fp16"):
        parse_dtype("fp8")


def test_one_format():
    assert stored_dtype("here", {"a": torch.bfloat16, "b": torch.bfloat16}) == torch.bfloat16


def test_several_formats_are_named_with_a_tensor_of_each():
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32}
    message = (
        r"here: b is torch.bfloat16 and a is torch.float32: formats are mixed; .*--dtype fp32\|"
    )
    with pytest.raises(CheckpointError, match=message):
        stored_dtype("here", dtypes)


def test_a_format_that_no_model_is_in():
    message = r"here: the tensors are torch.float8_e4m3fn, no model format; choose one with --dtype"
    with pytest.raises(CheckpointError, match=message):
        stored_dtype("here", {"a": torch.float8_e4m3fn})

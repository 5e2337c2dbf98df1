"""Safetensors files: planned layouts equal the library's, damaged files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from megatron_idpo.convert.hf_io.safetensors_file import (
    _DTYPE_NAMES,
    TensorSpec,
    plan_file,
    read_specs,
)
from megatron_idpo.errors import CheckpointError

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(deadline=None)
@given(
    tensors=st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        st.tuples(shapes, st.sampled_from(list(_DTYPE_NAMES))),
    ),
    metadata=st.dictionaries(names, names, max_size=1),  # the library's order of more is random
)
def test_planned_layout_equals_the_librarys(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]
) -> None:
    specs = [TensorSpec(name, shape, dtype) for name, (shape, dtype) in tensors.items()]
    plan = plan_file(specs, metadata)
    zeros = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs}
    expected = save(zeros, metadata=metadata or None)
    assert expected[: len(plan.header)] == plan.header
    assert plan.num_bytes == len(expected)
    assert sorted(spec.name for spec, _ in plan.tensors) == sorted(tensors)


def test_unsupported_dtype_is_not_planned() -> None:
    with pytest.raises(CheckpointError, match=r"^a: safetensors cannot store torch.complex128"):
        plan_file([TensorSpec("a", (1,), torch.complex128)], {})


def write_file(path: Path, document: Any, data_bytes: int) -> None:
    text = (document if isinstance(document, str) else json.dumps(document)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_shapes_and_dtypes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(
        path,
        {"a": entry(), "b": entry("BF16", (1, 2), (8, 12)), "c": entry(shape=[], offsets=(12, 16))},
        16,
    )
    assert read_specs(path) == {
        "a": TensorSpec("a", (2,), torch.float32),
        "b": TensorSpec("b", (1, 2), torch.bfloat16),
        "c": TensorSpec("c", (), torch.float32),
    }


DAMAGE = {
    "overlapping tensors": ({"a": entry(), "b": entry()}, "invalid offset for tensor `[ab]`"),
    "gap before a tensor": ({"a": entry(offsets=(4, 12))}, "invalid offset for tensor `a`"),
    "size contradicts shape": ({"a": entry(shape=(3,))}, "invalid shape, data type, or offset"),
    "unknown dtype": ({"a": entry(dtype="F5")}, "unknown variant `F5`"),
    "negative size": ({"a": entry(shape=(-2,))}, "invalid value: integer `-2`"),
    "no shape": ({"a": entry(shape=None)}, "invalid type: null"),
    "not an object": ({"a": 3}, "invalid type: integer `3`"),
    "metadata is not text": ({"__metadata__": {"x": 1}}, "expected a string"),
    "deep nesting": ('{"a":' + "[" * 100_000, "recursion limit"),
    "invalid JSON": ("{,}", "invalid JSON in header"),
}


@pytest.mark.parametrize(("document", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_header_is_refused(tmp_path: Path, document: Any, reason: str) -> None:
    write_file(tmp_path / "x.safetensors", document, 8)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_specs(tmp_path / "x.safetensors")
    assert "x.safetensors: is truncated, damaged or not a safetensors file" in str(error.value)
    assert "\n" not in str(error.value)


def test_dtype_that_torch_lacks_is_refused_by_tensor(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", {"a": entry("F8_E8M0", (8,))}, 8)
    message = r"x\.safetensors: tensor 'a' has the dtype F8_E8M0, which is not supported"
    with pytest.raises(CheckpointError, match=message):
        read_specs(tmp_path / "x.safetensors")

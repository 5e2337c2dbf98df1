"""Headers of safetensors files: planned as the library does, refused where it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from megatron_idpo.convert.hf_io.safetensors_header import (
    _DTYPE_NAMES,
    TensorSpec,
    plan_file,
    read_header,
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
def test_a_planned_file_is_the_librarys_own(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]
) -> None:
    specs = [TensorSpec(name, shape, dtype) for name, (shape, dtype) in tensors.items()]
    plan = plan_file(specs, metadata)
    zeros = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs}
    expected = save(zeros, metadata=metadata or None)
    assert expected[: len(plan.header)] == plan.header
    assert plan.num_bytes == len(expected)
    assert sorted(location.spec.name for location in plan.placements) == sorted(tensors)


def test_what_safetensors_cannot_store_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^a: safetensors cannot store torch.complex128"):
        plan_file([TensorSpec("a", (1,), torch.complex128)], {})


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789"{}[],:aI ') | st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as library:
            assert set(library.keys()) == set(found)
            for name, location in found.items():
                theirs = library.get_slice(name)
                assert tuple(theirs.get_shape()) == location.spec.shape
                start, stop = location.start, location.stop
                expected = library.get_tensor(name).flatten().view(torch.uint8)
                assert bytes(expected.numpy()) == bytes(content[start:stop])
    except SafetensorError as error:
        raise AssertionError("we accept what the library refuses") from error


def header_file(path: Path, document: Any, data_bytes: int) -> None:
    text = (document if isinstance(document, str) else json.dumps(document)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": entry(), "b": entry()}, "tensor 'b' begins at"),
        ({"a": entry(offsets=(4, 12))}, "tensor 'a' begins at"),
        ({"a": entry(shape=(3,))}, "tensor 'a' has 12 bytes by its shape"),
        ({"a": entry(dtype="F4")}, "tensor 'a' has the format 'F4'"),
        ({"a": entry(dtype=[])}, "tensor 'a' has"),
        ({"a": entry(shape=(-2,))}, "tensor 'a' has no valid shape"),
        ({"a": entry(shape=(0, 10**30), offsets=(0, 0))}, "'a' has the impossible shape"),
        ({"a": entry(shape=None)}, "tensor 'a' has no valid shape"),
        ({"a": 3}, "tensor 'a' has no valid shape"),
        ({"__metadata__": {"x": 1}}, "does not map strings"),
        ('{"a":1,"a":2}', "'a' is listed twice"),
        ('{"a":' + "[" * 100_000, "recursion"),
    ],
)
def test_contradictions_within_a_header(tmp_path: Path, document: Any, message: str) -> None:
    header_file(tmp_path / "x.safetensors", document, 8)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors: the safetensors header is garbage" in str(error.value)
    assert "\n" not in str(error.value)

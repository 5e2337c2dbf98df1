"""Reading Hugging Face checkpoints: slices, damaged files, memory, companions."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megatron_idpo.convert.hf_io import reader as hf_reader
from megatron_idpo.convert.hf_io.reader import INDEX_FILE, SINGLE_FILE, HfCheckpoint
from megatron_idpo.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
]
MAX_EXTRA_MB = 16  # of the allocator and of Python
same_directory = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randn(shape, generator=generator).mul(9).to(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards: `a` and `b` in the first, `c` in the second."""
    weights = {name: random_tensor((4, 3), torch.bfloat16) for name in "abc"}
    save_file({name: weights[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({"c": weights["c"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_json(directory: Path, **documents: Any) -> None:
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document))


def open_single(directory: Path, **tensors: Tensor) -> HfCheckpoint:
    save_file(tensors, directory / SINGLE_FILE)
    return HfCheckpoint(directory)


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "empty": (0, 3), "row": (5,), "matrix": (4, 3), "cube": (2, 3, 4)}
    weights = {name: random_tensor(shape, dtype) for name, shape in shapes.items()}
    checkpoint = open_single(tmp_path, **weights)
    assert checkpoint.names() == sorted(weights)
    for name, expected in weights.items():
        assert checkpoint.shape(name) == shapes[name] and checkpoint.dtype(name) == dtype
        assert same_bits(checkpoint.read(name), expected)


bounds = st.none() | st.integers(-9, 9)
slices = st.none() | st.builds(slice, bounds, bounds)


@same_directory
@given(
    shape=st.lists(st.integers(0, 6), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
    rows=slices,
    columns=slices,
)
def test_slices_equal_slices_of_the_whole_tensor(
    tmp_path: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: slice | None,
    columns: slice | None,
) -> None:
    whole = random_tensor(shape, dtype)
    checkpoint = open_single(tmp_path, before=torch.ones(3), it=whole, more=torch.ones(3))
    part = checkpoint.read("it", rows, columns)
    assert same_bits(part, whole[rows or slice(None), columns or slice(None)])


def test_rows_of_a_vector_are_read(tmp_path: Path) -> None:
    whole = random_tensor((10,), torch.float16)
    assert same_bits(open_single(tmp_path, it=whole).read("it", slice(3, 7)), whole[3:7])


def test_shards_form_one_checkpoint(sharded: Path) -> None:
    checkpoint = HfCheckpoint(sharded)
    assert checkpoint.names() == ["a", "b", "c"]
    assert same_bits(checkpoint.read("c"), random_tensor((4, 3), torch.bfloat16))


def test_single_file_takes_precedence_over_index_as_in_transformers(sharded: Path) -> None:
    save_file({"z": torch.ones(1)}, sharded / SINGLE_FILE)
    assert HfCheckpoint(sharded).names() == ["z"]


def cut_data(directory: Path) -> None:
    path = directory / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(directory: Path) -> None:
    path = directory / "one.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def append(directory: Path) -> None:
    with (directory / "one.safetensors").open("ab") as file:
        file.write(b"more")


def garbage(directory: Path) -> None:
    (directory / "one.safetensors").write_bytes(bytes(range(1, 200)))


def broken_json(directory: Path) -> None:
    path = directory / "one.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtype;', 1))


def lfs_pointer(directory: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (directory / "one.safetensors").write_text(text)


def listed_but_absent(directory: Path) -> None:
    files = {name: "one.safetensors" for name in ("a", "b", "zz")}
    write_index(directory, files | {"c": "two.safetensors"})


def twice(directory: Path) -> None:
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, directory / "two.safetensors")


CORRUPTIONS: list[tuple[Callable[[Path], Any], str]] = [
    (cut_data, r"one\.safetensors: is truncated, damaged .*not fully covered.*tensor 'a' and 1"),
    (cut_header, r"one\.safetensors: is truncated, damaged .*tensor 'a' and 1 others"),
    (append, r"one\.safetensors: is truncated, damaged .*not fully covered.*tensor 'a'"),
    (garbage, r"one\.safetensors: .*not a safetensors file.*tensor 'a' and 1 others"),
    (broken_json, r"one\.safetensors: .*invalid JSON in header.*tensor 'a'"),
    (lfs_pointer, r"one\.safetensors: is a Git LFS pointer"),
    (lambda d: (d / "two.safetensors").unlink(), r"two\.safetensors: is missing;.*tensor 'c'"),
    (twice, r"two\.safetensors: tensor 'a' is also in one\.safetensors"),
    (
        lambda d: write_index(d, {"a": "one.safetensors", "c": "two.safetensors"}),
        r"one\.safetensors: tensor 'b' is not in model\.safetensors\.index\.json",
    ),
    (lambda d: (d / INDEX_FILE).write_text("{"), r"index\.json: is not valid JSON"),
    (lambda d: (d / INDEX_FILE).write_text("[]"), r"index\.json: is not a JSON object"),
    (lambda d: write_index(d, None), r"index\.json: weight_map does not map"),
    (lambda d: write_index(d, {"a": "../x.safetensors"}), r"index\.json: weight_map does not"),
]


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS)
def test_damaged_checkpoint_is_refused_by_file_and_tensor(
    sharded: Path, corrupt: Callable[[Path], Any], message: str
) -> None:
    corrupt(sharded)
    with pytest.raises(CheckpointError, match=message) as error:
        HfCheckpoint(sharded)
    one_line(error)


def test_tensor_that_only_the_index_lists_is_accepted_if_it_is_ignored(sharded: Path) -> None:
    listed_but_absent(sharded)
    checkpoint = HfCheckpoint(sharded)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    checkpoint.check(shapes, ["z+"])
    message = r"one\.safetensors: tensor 'zz' is listed in .* but not in this file"
    for expected in (shapes, shapes | {"zz": (1,)}):
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.check(expected)
        one_line(error)


def test_all_damaged_shards_are_reported(sharded: Path) -> None:
    cut_data(sharded)
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*truncated.*two\.safetensors"):
        HfCheckpoint(sharded)


def test_file_damaged_after_opening_is_refused(sharded: Path) -> None:
    checkpoint = HfCheckpoint(sharded)
    cut_data(sharded)
    with pytest.raises(CheckpointError, match=r"one\.safetensors: is truncated"):
        checkpoint.read("b")
    (sharded / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: cannot be read: No such file"):
        checkpoint.read("b")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "pickled weights .pytorch_model.bin.*save_pretrained"),
        (["consolidated.00.pth"], "pickled weights"),
        ([], "has neither model.safetensors nor model.safetensors.index.json; copy"),
        (["adapter_model.safetensors"], "has neither .*, only adapter_model.safetensors"),
    ],
)
def test_directory_without_safetensors_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as error:
        HfCheckpoint(tmp_path)
    one_line(error)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        HfCheckpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        HfCheckpoint(tmp_path / "file")


def test_message_for_a_hub_name_says_how_to_download() -> None:
    with pytest.raises(CheckpointError, match=r"`hf download org/some-1\.5B --local-dir DIR`"):
        HfCheckpoint("org/some-1.5B")


def test_message_for_a_megatron_checkpoint_names_the_other_direction(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"is a Megatron checkpoint.*`convert megatron-to-hf`"
    ):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_broken_link_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=rf"{name}: is a broken link, as an int"):
        HfCheckpoint(tmp_path)


def test_broken_link_of_a_shard_is_reported(sharded: Path) -> None:
    (sharded / "one.safetensors").unlink()
    (sharded / "one.safetensors").symlink_to(sharded / "blob")
    with pytest.raises(CheckpointError, match=r"one\.safetensors: is a broken link"):
        HfCheckpoint(sharded)


def test_check_lists_every_difference(sharded: Path) -> None:
    checkpoint = HfCheckpoint(sharded)
    checkpoint.check({name: (4, 3) for name in "abc"})
    checkpoint.check({"a": (4, 3)}, ignored=["b|c"])
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        checkpoint.read("x")
    with pytest.raises(CheckpointError) as error:
        checkpoint.check({"a": (4, 4), "x": (1,), "b": (4, 3)})
    message = str(error.value)
    assert "3 problems" in message and "tensor 'x' of shape (1,) is missing" in message
    assert "'a' has shape (4, 3), expected (4, 4)" in message and "unexpected tensor 'c'" in message


def test_list_of_differences_is_limited(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="984 more problems of this kind") as error:
        HfCheckpoint(sharded).check({f"layer.{i}": (1,) for i in range(1000)})
    assert str(error.value).count("\n") == hf_reader._MAX_REPORTED


def test_config_and_companions(tmp_path: Path) -> None:
    checkpoint = open_single(tmp_path, a=torch.ones(1))
    assert checkpoint.companions == ()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        _ = checkpoint.config
    write_json(tmp_path, config={"vocab_size": 7}, generation_config={}, vocab={"x": 0}, tekken={})
    (tmp_path / "tokenizer.model.v3").touch()
    for name in ("README.md", "LICENSE", "USE_POLICY.md", "MY_LICENSE"):
        (tmp_path / name).touch()
    assert checkpoint.config == {"vocab_size": 7}
    names = [path.name for path in checkpoint.companions]
    tokenizer = ["tokenizer.model.v3", "tekken.json", "vocab.json"]
    assert names == [
        "config.json",
        "generation_config.json",
        *tokenizer,
        "LICENSE",
        "USE_POLICY.md",
    ]
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        _ = HfCheckpoint(tmp_path).config


READ_ALL = """
import re, sys, torch
from pathlib import Path
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
def anonymous_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
checkpoint = HfCheckpoint(sys.argv[1])
start_mb = anonymous_mb()
for columns in (slice(0, 512), None):
    peak_mb = 0
    for name in checkpoint.names():
        tensor = checkpoint.read(name, columns=columns)
        peak_mb = max(peak_mb, anonymous_mb())
        del tensor
    print(peak_mb - start_mb)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    """Anonymous memory: mapped files are page cache, which the kernel can take back."""
    tensor_mb = 64
    weights = {f"t{i}": torch.ones(tensor_mb << 9, 1024, dtype=torch.bfloat16) for i in range(2)}
    save_file(weights, tmp_path / SINGLE_FILE)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    columns_mb, all_mb = map(int, done.stdout.split())
    assert columns_mb < tensor_mb / 2 + MAX_EXTRA_MB
    assert all_mb < tensor_mb + MAX_EXTRA_MB


def test_replaced_file_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    checkpoint = HfCheckpoint(tmp_path)
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' has changed since it was opened"):
        checkpoint.read("a", slice(0, 2))
    save_file({"b": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="File does not contain tensor a"):
        checkpoint.read("a")

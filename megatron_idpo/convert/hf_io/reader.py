"""A Hugging Face checkpoint directory, read slice by slice.

Opening reads the index and the shards' headers and finds every contradiction between them; `read`
then reads only the bytes asked for, with positioned reads into the tensor's own memory. Nothing is
memory-mapped, so a process never holds more than the tensor it reads (mapped pages would count as
its memory until the file is closed), and a file cut short under it is an error, not a bus error.

Pickled weights (`.bin`, `.pt`) are refused. What tensors mean is the business of `families`.

    R  rows   C  columns   I  the bytes of one element of a column, all further dimensions included
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.convert.hf_io.safetensors_header import Placement, read_header
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    check_vocabulary,
    read_json_object,
)
from megatron_idpo.errors import CheckpointError, Problem

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BLOCK_BYTES = 8 << 20  # read at once where columns are picked: large for the disk, small for us
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DANGLING = "is a link that points nowhere, as an interrupted download leaves it"
_MAX_TOLD = 20  # problems shown of a checkpoint that is another model altogether


class HfCheckpoint:
    """The tensors, configuration and companion files of one checkpoint directory.

    Holds no open files: instances can be pickled and used in several processes at once.
    """

    def __init__(self, directory: Path | str, single_file: str = SINGLE_FILE) -> None:
        """Opens `model.safetensors` (first, as Transformers does) or the shards of the index.

        Args:
            directory: what `save_pretrained` or a download from the hub left.
            single_file: what the file is called if there is only one.

        Raises:
            CheckpointError: no safetensors there, a shard that is missing, truncated or garbage, or
                shards and index that contradict each other; every problem at once.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise _no_directory(self.directory)
        if (self.directory / single_file).is_file():
            path = self.directory / single_file
            self._places = {name: (path, location) for name, location in read_header(path).items()}
        elif (self.directory / INDEX_FILE).is_file():
            self._places = _sharded(self.directory)
        else:
            raise _nothing_to_read(self.directory)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._place(name)[1].spec.shape

    def dtype(self, name: str) -> torch.dtype:
        """The format the tensor is stored in."""
        return self._place(name)[1].spec.dtype

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or some of it: `tensor[rows, columns]`.

        Rows are read alone; columns by way of blocks of whole rows, as disks like it.

        Args:
            name: one of `names()`.
            rows: of dimension 0, step 1, as Python slices; None takes all.
            columns: of dimension 1, likewise.

        Returns:
            A fresh contiguous tensor on the CPU in the stored format.

        Raises:
            CheckpointError: no such tensor, or the file has changed since it was opened.
        """
        path, location = self._place(name)
        shape = list(location.spec.shape)
        start_row, shape[:1] = _span(rows, shape[:1])
        start_column, shape[1:2] = _span(columns, shape[1:2])
        item_bytes = math.prod(shape[2:]) * location.spec.dtype.itemsize
        row_bytes = math.prod(location.spec.shape[1:]) * location.spec.dtype.itemsize
        flat = torch.empty(math.prod(shape) * location.spec.dtype.itemsize, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                position = location.start + start_row * row_bytes
                if shape[1:2] == list(location.spec.shape[1:2]):
                    _read_into(file.fileno(), flat, position)
                elif flat.numel():
                    cut = slice(start_column * item_bytes, (start_column + shape[1]) * item_bytes)
                    out_RI = flat.view(shape[0], -1)
                    _read_columns(file.fileno(), out_RI, position, row_bytes, cut)
        except (OSError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it has become shorter"
            raise CheckpointError.at(str(path), f"cannot read tensor {name!r}: {reason}") from None
        return flat.view(location.spec.dtype).view(shape)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """The checkpoint holds exactly the expected tensors.

        Args:
            expected: the shape of every tensor that has to be there.
            ignored: regular expressions; a tensor whose whole name matches one may be there too.

        Raises:
            CheckpointError: all missing, unexpected and wrong-shaped tensors.
        """
        problems = [
            Problem(str(self.directory), f"tensor {name!r} of shape {shape} is missing")
            for name, shape in expected.items()
            if name not in self._places
        ]
        for name in self.names():
            if name in expected:
                if self.shape(name) != tuple(expected[name]):
                    problems.append(self._wrong_shape(name, expected[name]))
            elif not any(re.fullmatch(pattern, name) for pattern in ignored):
                path = str(self._place(name)[0])
                problems.append(Problem(path, f"unexpected tensor {name!r} {self.shape(name)}"))
        _raise_any(problems, self.directory)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`; CheckpointError if it is absent or not JSON."""
        return read_json_object(self.directory / CONFIG_FILE)

    @property
    def generation_config(self) -> Path | None:
        """`generation_config.json`, where there is one."""
        path = self.directory / GENERATION_CONFIG_FILE
        return path if path.is_file() else None

    @property
    def companions(self) -> tuple[Path, ...]:
        """The files that travel with the weights: configurations and tokenizer, where present."""
        names = (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES)
        return tuple(self.directory / name for name in names if (self.directory / name).is_file())

    def check_vocabulary(self) -> None:
        """The model has an embedding for every id of its tokenizer; more of them are normal.

        Raises:
            CheckpointError: an id is beyond `vocab_size` of `config.json`, or that is absent.
        """
        check_vocabulary(self.directory, self.config.get("vocab_size"))

    def _place(self, name: str) -> tuple[Path, Placement]:
        if name not in self._places:
            raise CheckpointError.at(str(self.directory), f"there is no tensor {name!r}")
        return self._places[name]

    def _wrong_shape(self, name: str, expected: Sequence[int]) -> Problem:
        path, location = self._place(name)
        return Problem(
            str(path),
            f"tensor {name!r} has shape {location.spec.shape}, expected {tuple(expected)}",
        )


def _sharded(directory: Path) -> dict[str, tuple[Path, Placement]]:
    """The tensors of all shards, agreed upon by the index and the shards' own headers."""
    path = directory / INDEX_FILE
    listed = read_json_object(path).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in listed.values()
    ):
        raise CheckpointError.at(str(path), "weight_map does not map tensors to file names")
    problems: list[Problem] = []
    locations: dict[str, tuple[Path, Placement]] = {}
    for file in sorted(set(listed.values())):
        shard = directory / file
        try:
            found = read_header(shard)
        except CheckpointError as error:
            problems.append(_unreadable(shard, listed, error))
            continue
        for name, location in found.items():
            if name in locations:
                other = locations[name][0].name
                problems.append(Problem(str(shard), f"tensor {name!r} is also in {other}"))
            elif name not in listed:
                problems.append(Problem(str(shard), f"tensor {name!r} is not in {INDEX_FILE}"))
            else:
                locations[name] = (shard, location)
        absent = sorted(name for name in listed if listed[name] == file and name not in found)
        problems += [
            Problem(str(shard), f"tensor {name!r} is listed in {INDEX_FILE} but not in this file")
            for name in absent
        ]
    _raise_any(problems, directory)
    return locations


def _unreadable(shard: Path, listed: Mapping[str, str], error: CheckpointError) -> Problem:
    """Why a shard cannot be used, and which tensors that costs."""
    names = sorted(name for name in listed if listed[name] == shard.name)
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    holds = f"by {INDEX_FILE} it holds tensor {names[0]!r}{others}"
    if shard.exists():
        return Problem(str(error), holds)
    if shard.is_symlink():
        return Problem(str(shard), f"{_DANGLING}; {holds}", "download it again")
    return Problem(str(shard), f"is missing; {holds}", "download or copy this file")


def _raise_any(problems: list[Problem], directory: Path) -> None:
    """Raises the problems, the first of them if there are very many."""
    if len(problems) > _MAX_TOLD:
        more = Problem(str(directory), f"{len(problems) - _MAX_TOLD + 1} more problems like these")
        problems = [*problems[: _MAX_TOLD - 1], more]
    if problems:
        raise CheckpointError.of(problems)


def _no_directory(path: Path) -> CheckpointError:
    if path.exists():
        return CheckpointError.at(str(path), "is a file", "name a checkpoint's directory")
    if _HUB_NAME.fullmatch(str(path)):
        remedy = f"if it is a model on the hub, `hf download {path} --local-dir DIR` and give DIR"
    else:
        remedy = "name a checkpoint's directory"
    return CheckpointError.at(str(path), "does not exist", remedy)


def _nothing_to_read(directory: Path) -> CheckpointError:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_symlink():
            return CheckpointError.at(str(directory / name), _DANGLING, "download it again")
    if (directory / "metadata.json").is_file():
        return CheckpointError.at(
            str(directory),
            "is a Megatron checkpoint, no Hugging Face directory",
            "the other way is `convert megatron-to-hf`",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return CheckpointError.at(
            str(directory),
            f"has only pickled weights ({pickles[0]}), and unpickling runs whatever code is inside",
            "where you trust the file, re-save it as safetensors: `AutoModelForCausalLM"
            ".from_pretrained(directory).save_pretrained(new_directory)`",
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f", only {', '.join(others[:3])}" if others else ""
    return CheckpointError.at(str(directory), f"has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def _span(wanted: slice | None, sizes: list[int]) -> tuple[int, list[int]]:
    """Start and size of a slice of a dimension, which `sizes` holds if the tensor has it."""
    if wanted is None:
        return 0, sizes
    assert sizes, "a slice of a dimension that the tensor does not have"
    start, stop, step = wanted.indices(sizes[0])
    assert step == 1, f"{wanted} does not take neighbours"
    return start, [max(stop - start, 0)]


def _read_into(descriptor: int, flat: Tensor, position: int) -> None:
    """Fills a flat uint8 tensor from a position of the file."""
    rest = memoryview(flat.numpy())
    while rest:
        count = os.preadv(descriptor, [rest], position)
        if count == 0:
            raise EOFError
        rest, position = rest[count:], position + count


def _read_columns(
    descriptor: int, out_RI: Tensor, position: int, row_bytes: int, cut: slice
) -> None:
    """Fills `out_RI` with the bytes `cut` of each row, from blocks of whole rows."""
    num_rows = min(out_RI.shape[0], max(_BLOCK_BYTES // row_bytes, 1))
    block = torch.empty(num_rows * row_bytes, dtype=torch.uint8)
    for part_RI in out_RI.split(num_rows):
        part = block[: part_RI.shape[0] * row_bytes]
        _read_into(descriptor, part, position)
        part_RI.copy_(part.view(part_RI.shape[0], row_bytes)[:, cut])
        position += part.numel()

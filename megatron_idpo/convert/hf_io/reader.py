"""Hugging Face checkpoint directories, read tensor by tensor or slice by slice.

Opening reads the index and the headers of all shards and reports every contradiction between them.
`read` maps a file only while it copies what was asked for, so a process holds no more than that.

Pickled weights (`.bin`, `.pt`) are refused. `families` knows what the tensors mean.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.convert.hf_io.end_tokens import GENERATION_CONFIG_FILE
from megatron_idpo.convert.hf_io.safetensors_file import (
    TensorSpec,
    check_tensors,
    opened,
    read_spec,
    read_specs,
)
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    LICENSE_FILES,
    TOKENIZER_FILES,
    check_vocabulary,
    read_json_object,
)
from megatron_idpo.errors import CheckpointError, Problem

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DANGLING = "is a broken link, as an interrupted download leaves it"
_MAX_REPORTED = 20  # problems of one checkpoint: a different model would have hundreds


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix that is stored as a part of a larger tensor."""

    source: str
    """The name of that tensor."""

    source_shape: tuple[int, ...]
    """Its expected shape."""

    index: int | None = None
    """In the first of its three dimensions; None if it is the matrix itself."""

    first_row: int = 0


class HfCheckpoint:
    """Tensors, configuration and companion files of one checkpoint directory.

    Holds no open files: instances can be pickled and used by several processes at once.
    """

    def __init__(self, directory: Path | str, single_file: str = SINGLE_FILE) -> None:
        """Opens the single file if there is one, as Transformers does, else the index's shards.

        Args:
            directory: written by `save_pretrained` or downloaded from the hub.
            single_file: name of the weights file if there is only one.

        Raises:
            CheckpointError: there are no safetensors files, a shard is missing or damaged, or
                shards and index contradict each other; lists every problem.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise _no_directory(self.directory)
        # Tensors that the index lists in a shard that lacks them, with the shard.
        self._absent: dict[str, Path] = {}
        self._parts: dict[str, tuple[Part, TensorSpec]] = {}
        path = self.directory / single_file
        if path.is_file():
            self._tensors = {name: (path, spec) for name, spec in read_specs(path).items()}
        elif (self.directory / INDEX_FILE).is_file():
            self._tensors, self._absent = _read_shards(self.directory)
        else:
            raise _no_weights(self.directory)

    def split(self, parts: Mapping[str, tuple[Part, int]]) -> None:
        """Have parts of stored tensors as tensors of the checkpoint, in place of these.

        Args:
            parts: by their names, with their numbers of rows.

        Raises:
            CheckpointError: a stored tensor does not have the expected shape, or a part is
                also stored as a separate tensor.
        """
        problems = []
        for name, (part, num_rows) in parts.items():
            path, spec = self._tensor(part.source)
            if name != part.source and name in self._tensors:
                message = f"tensor {name!r} is stored twice: alone, and in {part.source!r}"
                problems.append(Problem(str(path), message, "remove one of them"))
            if spec.shape != part.source_shape:
                message = f"tensor {part.source!r} has shape {spec.shape}"
                problems.append(Problem(str(path), f"{message}, expected {part.source_shape}"))
            self._parts[name] = (part, spec)
            self._tensors[name] = (path, TensorSpec(name, (num_rows, spec.shape[-1]), spec.dtype))
        for source in {part.source for part, _ in parts.values()} - parts.keys():
            del self._tensors[source]
        _raise_any(list(dict.fromkeys(problems)), self.directory)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._tensor(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype the tensor is stored in."""
        return self._tensor(name)[1].dtype

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Reads a tensor or a part of it: `tensor[rows, columns]`.

        Args:
            name: one of `names()`.
            rows: of dimension 0, step 1; None reads all.
            columns: of dimension 1, step 1; None reads all.

        Returns:
            A new contiguous tensor on the CPU in the stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or the file has been damaged, replaced or
                removed since it was opened. (Truncated in place during the read, it is a SIGBUS.)
        """
        path, spec = self._tensor(name)
        given = [cut for cut in (rows, columns) if cut is not None]
        assert all(cut.step in (None, 1) for cut in given) and len(given) <= len(spec.shape), name
        index: tuple[int | slice, ...] = (rows or slice(None), columns or slice(None))
        index, source = index[: len(spec.shape)], name
        if name in self._parts:
            part, spec = self._parts[name]
            cut, source = rows or slice(0, self.shape(name)[0]), part.source
            moved = slice(cut.start + part.first_row, cut.stop + part.first_row)
            leading = () if part.index is None else (part.index,)
            index = (*leading, moved, columns or slice(None))
        with opened(path) as file:
            if read_spec(path, file, source) != spec:
                raise CheckpointError.at(
                    str(path), f"tensor {source!r} has changed since it was opened"
                )
            view: Tensor = file.get_slice(source)[index] if index else file.get_tensor(source)
            # A copy: the view would keep the whole file mapped.
            return view.clone(memory_format=torch.contiguous_format)

    def verify(self, *, share: int = 0, shares: int = 1) -> None:
        """Compares all tensors, or a share of them, with the checksums in their files, if any.

        Args:
            share: which of the tensors: those of this rank, if the ranks divide the work.
            shares: into how many parts they are divided.

        Raises:
            CheckpointError: a tensor has been changed, or a file cannot be read.
        """
        for path in sorted({path for path, _ in self._tensors.values()}):
            check_tensors(path, share=share, shares=shares)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Checks that the checkpoint holds exactly the expected tensors.

        Args:
            expected: name -> shape of every required tensor.
            ignored: regular expressions; a tensor whose whole name matches one may also exist, or
                only be listed in the index.

        Raises:
            CheckpointError: lists all missing, unexpected and wrong-shaped tensors.
        """

        def is_ignored(name: str) -> bool:
            return any(re.fullmatch(pattern, name) for pattern in ignored)

        problems = [
            Problem(str(shard), f"tensor {name!r} is listed in {INDEX_FILE} but not in this file")
            for name, shard in self._absent.items()
            if not is_ignored(name)
        ]
        problems += [
            Problem(str(self.directory), f"tensor {name!r} of shape {shape} is missing")
            for name, shape in expected.items()
            if name not in self._tensors and name not in self._absent
        ]
        for name, (path, spec) in sorted(self._tensors.items()):
            if name not in expected:
                if not is_ignored(name):
                    message = f"unexpected tensor {name!r} {spec.shape}"
                    problems.append(Problem(str(path), message))
            elif spec.shape != tuple(expected[name]):
                message = f"tensor {name!r} has shape {spec.shape}, expected {expected[name]}"
                problems.append(Problem(str(path), message))
        _raise_any(problems, self.directory)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; CheckpointError if it is missing or not JSON."""
        return read_json_object(self.directory / CONFIG_FILE)

    @property
    def companions(self) -> tuple[Path, ...]:
        """The existing files that belong to the weights: configurations, tokenizer, license."""
        names = [CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES]
        present = sorted(path.name for path in self.directory.iterdir())
        names += [name for name in present if any(fnmatchcase(name, p) for p in LICENSE_FILES)]
        return tuple(self.directory / name for name in names if (self.directory / name).is_file())

    def check_vocabulary(self) -> None:
        """Checks that the model has an embedding for every token; it may have more.

        Raises:
            CheckpointError: a token id is not below `vocab_size` of `config.json`, or that is
                missing.
        """
        check_vocabulary(self.directory, self.config.get("vocab_size"))

    def _tensor(self, name: str) -> tuple[Path, TensorSpec]:
        if name not in self._tensors:
            raise CheckpointError.at(str(self.directory), f"there is no tensor {name!r}")
        return self._tensors[name]


def _read_shards(directory: Path) -> tuple[dict[str, tuple[Path, TensorSpec]], dict[str, Path]]:
    """The tensors of all shards, and the shards of tensors that only the index lists.

    Those may be harmless (see `HfCheckpoint.check`). Otherwise index and headers must agree.
    """
    path = directory / INDEX_FILE
    listed = read_json_object(path).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in listed.values()
    ):
        raise CheckpointError.at(str(path), "weight_map does not map tensors to file names")
    problems: list[Problem] = []
    tensors: dict[str, tuple[Path, TensorSpec]] = {}
    absent: dict[str, Path] = {}
    for file in sorted(set(listed.values())):
        shard = directory / file
        try:
            specs = read_specs(shard)
        except CheckpointError as error:
            problems.append(_unreadable_shard(shard, listed, error))
            continue
        for name, spec in specs.items():
            if name in tensors:
                other = tensors[name][0].name
                problems.append(Problem(str(shard), f"tensor {name!r} is also in {other}"))
            elif name not in listed:
                problems.append(Problem(str(shard), f"tensor {name!r} is not in {INDEX_FILE}"))
            else:
                tensors[name] = (shard, spec)
        names = sorted(name for name in listed if listed[name] == file and name not in specs)
        absent |= dict.fromkeys(names, shard)
    _raise_any(problems, directory)
    return tensors, absent


def _unreadable_shard(shard: Path, listed: Mapping[str, str], error: CheckpointError) -> Problem:
    """Why a shard cannot be read, and which tensors are missing as a consequence."""
    names = sorted(name for name in listed if listed[name] == shard.name)
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    holds = f"{INDEX_FILE} lists tensor {names[0]!r}{others} in it"
    if shard.exists():
        return Problem(str(error), holds)
    if shard.is_symlink():
        return Problem(str(shard), f"{_DANGLING}; {holds}", "download it again")
    return Problem(str(shard), f"is missing; {holds}", "download or copy this file")


def _raise_any(problems: list[Problem], directory: Path) -> None:
    """Raises the problems if there are any; only the first of very many."""
    if len(problems) > _MAX_REPORTED:
        num_more = len(problems) - _MAX_REPORTED + 1
        more = Problem(str(directory), f"{num_more} more problems of this kind")
        problems = [*problems[: _MAX_REPORTED - 1], more]
    if problems:
        raise CheckpointError.of(problems)


def _no_directory(path: Path) -> CheckpointError:
    if path.exists():
        return CheckpointError.at(str(path), "is a file", "name a checkpoint directory")
    if _HUB_NAME.fullmatch(str(path)):
        remedy = f"for a model on the hub, run `hf download {path} --local-dir DIR` and name DIR"
    else:
        remedy = "name a checkpoint directory"
    return CheckpointError.at(str(path), "does not exist", remedy)


def _no_weights(directory: Path) -> CheckpointError:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_symlink():
            return CheckpointError.at(str(directory / name), _DANGLING, "download it again")
    if (directory / "metadata.json").is_file():
        return CheckpointError.at(
            str(directory),
            "is a Megatron checkpoint, not a Hugging Face directory",
            "to convert it, use `convert megatron-to-hf`",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return CheckpointError.at(
            str(directory),
            f"has only pickled weights ({pickles[0]}), and unpickling runs any code inside",
            "if you trust the file, save it as safetensors: `AutoModelForCausalLM"
            ".from_pretrained(directory).save_pretrained(new_directory)`",
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    only = f", only {', '.join(others[:3])}" if others else ""
    message = f"has neither {SINGLE_FILE} nor {INDEX_FILE}{only}"
    return CheckpointError.at(str(directory), message, "copy the model here again, or name another")

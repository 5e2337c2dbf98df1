"""A file of weights with checksums, as an export of training has."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_idpo.convert.hf_io.safetensors_file import CHECKSUMS, TensorSpec, plan_file


def write_checked(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors in one file, with the checksums of all."""
    content = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    specs = [TensorSpec(name, tuple(one.shape), one.dtype) for name, one in tensors.items()]
    sums = {spec.name: spec.checksum(content[spec.name]) for spec in specs}
    empty = plan_file(specs, {"format": "pt", CHECKSUMS: "0" * 32 * len(specs)})
    plan = plan_file(specs, {"format": "pt", CHECKSUMS: empty.checksums(sums)})
    data = bytearray(plan.num_bytes)
    data[: len(plan.header)] = plan.header
    for spec, start in plan.tensors:
        data[start : start + spec.num_bytes] = content[spec.name]
    path.write_bytes(data)

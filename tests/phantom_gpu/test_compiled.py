"""FlexAttention compiled by Inductor, Triton and ptxas for an H100, from our own call.

A new cache each time, so that nothing is found compiled. Exhaustive: the backward pass and other
head sizes, which take up to a minute and a half each, in new processes.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.testing.phantom_gpu import environment, run_python

from .compiled_attention import compiled_difference

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""bf16 rounds the softmax weights and every stored result."""

SIZES = [(128, "bfloat16", False, 1)]
SIZES += [(head_dim, "bfloat16", True, 1) for head_dim in (64, 80, 96, 128, 256)]
SIZES += [(64, "float32", True, 1)]
SIZES += [(128, "bfloat16", True, 4)]
"""Head size, dtype, with gradients, context-parallel ranks: of 256 positions, one has 64 queries,
fewer than a block, times four query heads of a key-value head more than one."""


@pytest.mark.distributed
def test_attention_is_compiled_for_the_gpu(gpu_workers: Any, tmp_path: Path) -> None:
    (difference,) = gpu_workers.run_as_program(
        compiled_difference, 1, str(tmp_path), 128, "bfloat16", False
    )
    assert difference < TOLERANCES["bfloat16"]
    assert len(kernels(tmp_path)) >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("head_dim", "dtype", "with_grad", "ranks"), SIZES)
def test_every_size_is_compiled_for_the_gpu(
    has_phantom_gpu, tmp_path, head_dim, dtype, with_grad, ranks
):
    script = str(Path(__file__).with_name("compiled_attention.py"))
    variables = environment(arithmetic="compiled", cache=tmp_path)
    words = [str(word) for word in (head_dim, dtype, with_grad, ranks)]
    ran = run_python(["-W", "ignore", script, *words], variables)
    assert ran.code == 0, ran.stderr
    assert float(ran.stdout) < TOLERANCES[dtype]
    assert len(kernels(tmp_path)) >= (2 if with_grad else 1)


def kernels(cache: Path) -> set[str]:
    """Those compiled for the GPU."""
    return {path.stem for path in cache.rglob("*.cubin")}

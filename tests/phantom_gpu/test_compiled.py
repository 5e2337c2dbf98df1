"""FlexAttention compiled by Inductor, Triton and ptxas for an H100, from our own call.

A new cache each time, so that nothing is found compiled. Exhaustive: the backward pass and other
head sizes, which take up to a minute and a half each.
"""

from pathlib import Path

import pytest

from megatron_idpo.testing.phantom_gpu import environment, run_python

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""bf16 rounds the softmax weights and every stored result."""

MORE_SIZES = [
    pytest.param(head_dim, "bfloat16", True, marks=pytest.mark.exhaustive)
    for head_dim in (64, 80, 96, 128, 256)
]
IN_FLOAT32 = pytest.param(64, "float32", True, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "with_grad"), [(128, "bfloat16", False), *MORE_SIZES, IN_FLOAT32]
)
def test_attention_is_compiled_for_the_gpu(has_phantom_gpu, tmp_path, head_dim, dtype, with_grad):
    script = str(Path(__file__).with_name("compiled_attention.py"))
    variables = environment(arithmetic="compiled", cache=tmp_path)
    ran = run_python(["-W", "ignore", script, str(head_dim), dtype, str(with_grad)], variables)
    assert ran.code == 0, ran.stderr
    assert float(ran.stdout) < TOLERANCES[dtype]
    kernels = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert len(kernels) >= (2 if with_grad else 1), kernels

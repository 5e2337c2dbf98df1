"""Row attention, compiled for the phantom GPU, compared with the CPU path.

As a program, `compiled_attention.py HEAD_DIM DTYPE WITH_GRAD RANKS` prints the difference.
"""

import os
import sys

import torch

from megatron_idpo.mcore.attention.flex import attend_row_flex
from megatron_idpo.mcore.attention.sdpa import attend_row
from megatron_idpo.testing.phantom_gpu.device import phantom
from megatron_idpo.testing.phantom_gpu.launch import ARITHMETIC
from tests.mcore.attention.rows import dealt_rows, make_row

GROUPS, ROW_TOKENS = [(0, 100, 150, 210), (210, 230, 240, 250)], 256


def compiled_difference(cache: str, head_dim: int, dtype: str, with_grad: bool) -> float:
    """`difference` in a program that was forked from a server which does not compile."""
    import torch._dynamo.config

    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    os.environ |= {ARITHMETIC: "compiled", "TORCHDYNAMO_DISABLE": "0"}
    torch._dynamo.config.disable = False
    return difference(head_dim, getattr(torch, dtype), with_grad)


def difference(head_dim: int, dtype: torch.dtype, with_grad: bool, ranks: int = 1) -> float:
    """The largest of outputs and gradients, relative to the largest value.

    With several context-parallel `ranks`, of the first one's part of the row.
    """
    shapes = [(ROW_TOKENS, 1, heads, head_dim) for heads in (8, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    with phantom():
        for attend, device in ((attend_row_flex, "cuda"), (attend_row, "cpu")):
            inputs = [tensor.to(device).requires_grad_(with_grad) for tensor in host]
            row = make_row(GROUPS, ROW_TOKENS, device)
            if ranks > 1:
                row = dealt_rows(GROUPS, ROW_TOKENS, ranks, device)[0]
                own = torch.from_numpy(row.own_positions_L).to(device)
                inputs[0] = inputs[0].detach()[own].requires_grad_(with_grad)
            output = attend(*inputs, row=row, scale=head_dim**-0.5, window=None)
            parts = [output]
            if with_grad:
                parts += torch.autograd.grad(output.float().square().sum(), inputs)
            results.append([part.detach().cpu().float() for part in parts])
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)
    ]
    return max(differences)


if __name__ == "__main__":
    words = sys.argv[1:]
    print(difference(int(words[0]), getattr(torch, words[1]), words[2] == "True", int(words[3])))

"""Row attention, compiled for the phantom GPU: `compiled_attention.py HEAD_DIM DTYPE WITH_GRAD`.

Prints the largest difference to the CPU path, relative to the largest value.
"""

import sys

import torch

from megatron_idpo.mcore.attention.flex import attend_row_flex
from megatron_idpo.mcore.attention.sdpa import attend_row
from megatron_idpo.testing.phantom_gpu.device import phantom
from tests.mcore.attention.rows import make_row

GROUPS, ROW_TOKENS = [(0, 100, 150, 210), (210, 230, 240, 250)], 256


def main() -> None:
    head_dim, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    with_grad = sys.argv[3] == "True"
    shapes = [(ROW_TOKENS, 1, heads, head_dim) for heads in (4, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    with phantom():
        for attend, device in ((attend_row_flex, "cuda"), (attend_row, "cpu")):
            inputs = [tensor.to(device).requires_grad_(with_grad) for tensor in host]
            row = make_row(GROUPS, ROW_TOKENS, device)
            output = attend(*inputs, row=row, scale=head_dim**-0.5, window=None)
            parts = [output]
            if with_grad:
                parts += torch.autograd.grad(output.float().square().sum(), inputs)
            results.append([part.detach().cpu().float() for part in parts])
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)
    ]
    print(max(differences))


if __name__ == "__main__":
    main()

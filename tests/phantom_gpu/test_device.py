"""The phantom GPU itself, and the CUDA branches that no whole run takes."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.cli.limits import limit_error
from megatron_idpo.testing.phantom_gpu.counters import Counts
from tests.mcore.attention.rows import MIXED, ROW_TOKENS, make_row

pytestmark = pytest.mark.distributed

# ---- on workers ---------------------------------------------------------------------------------


def budget_message(syncs: int) -> str:
    from megatron_idpo.testing.phantom_gpu.device import BudgetExceeded, current_gpu

    values = torch.arange(6.0, device="cuda").view(2, 3)
    try:
        with current_gpu().budget(syncs=syncs):
            assert float((values @ values.t()).sum()) == 83.0
            assert values[values > 3].tolist() == [4.0, 5.0]
    except BudgetExceeded as error:
        return str(error)
    return ""


def dropped_twice() -> tuple[Tensor, Tensor, list[int]]:
    """Input after dropout in the forward pass, in the backward pass, and sizes that are kept."""
    from megatron_idpo.mcore.lora.products import dropout_linear

    torch.cuda.manual_seed(5)
    torch.rand(3, device="cuda")  # the masks do not start at the seed
    inputs = torch.ones(64, 32, device="cuda", requires_grad=True)
    down = torch.eye(32, device="cuda", requires_grad=True)
    dropped = dropout_linear(inputs, [down, down], 0.25)
    first, second = dropped.chunk(2, dim=1)
    other = dropout_linear(inputs, [down], 0.25)
    assert not any(torch.equal(one, two) for one, two in combinations((first, second, other), 2))
    kept = {tensor.data_ptr(): tensor.numel() for tensor in dropped.grad_fn.saved_tensors}
    (grad,) = torch.autograd.grad(dropped.sum(), inputs)
    return (first + second).detach().cpu(), grad.cpu(), list(kept.values())


def rounded_once() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """An exact sum, the output with adapters, the output of zeros; launches of each and without."""
    from megatron_idpo.mcore.lora.frozen_linear import frozen_linear
    from megatron_idpo.mcore.lora.products import WHOLE, LowRank

    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 32), (48, 32), (64, 4), (48, 4))
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    values[3] *= 2**-8
    input_TI, weight_OI, low_TR, up_OR = (tensor.cuda() for tensor in values)
    outputs, launches = [], []
    for up in (up_OR, torch.zeros_like(up_OR), None):
        low_rank = None if up is None else LowRank(low_TR, [up], 1.0, WHOLE)
        before = Counts.now()
        outputs.append(frozen_linear(input_TI, weight_OI, None, low_rank))
        spent = Counts.now().since(before)
        launches.append(spent.launches + spent.gemms)
    assert torch.equal(outputs[1], outputs[2])
    wide = [tensor.double() for tensor in values]
    exact = wide[0] @ wide[1].t() + wide[2] @ wide[3].t()
    return exact, outputs[0].cpu(), outputs[2].cpu(), launches


def copied_in_inference_mode() -> list[float]:
    with torch.inference_mode():
        values = torch.arange(6.0, device="cuda").view(2, 3)
        return values.t().reshape(6).tolist() + values.t().contiguous().flatten().tolist()


def random_numbers_differ_by_state() -> bool:
    torch.cuda.manual_seed(1)
    first, second = (torch.rand(4, device="cuda") for _ in range(2))
    torch.cuda.manual_seed(1)
    return torch.equal(first, torch.rand(4, device="cuda")) and not torch.equal(first, second)


def collective_of_a_cpu_tensor() -> str:
    import torch.distributed as dist

    total = torch.ones(2, device="cuda")
    dist.all_reduce(total)
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, "an object")
    assert total.tolist() == [1.0, 1.0] and gathered == ["an object"]
    try:
        dist.all_reduce(torch.ones(2))
    except RuntimeError as error:
        return str(error)
    return ""


def polled_save() -> int:
    """Polls until a job in the background has ended; each is a collective over NCCL."""
    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    worker, polls = BackgroundWorker(), 1
    worker.start(lambda: None)
    while not worker.poll():
        polls += 1
    return polls


def full_memory_message() -> str:
    try:
        torch.empty(1 << 40, device="cuda")
    except torch.OutOfMemoryError as error:
        return str(limit_error(error))
    return ""


def mask_copies() -> Counts:
    """What a row's mask costs beyond its kernels."""
    from megatron_idpo.mcore.attention import flex

    row = make_row(MIXED, ROW_TOKENS, "cuda")
    before = Counts.now()
    flex.block_mask(row, None)
    return Counts.now().since(before)


def attended(head_dim: int, device: str) -> Tensor:
    """Row attention and its gradients on a device."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_idpo.mcore.attention.row_attention import RowAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=head_dim,
        attention_dropout=0.0,
    )
    attention = RowAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROW_TOKENS, 1, heads, head_dim) for heads in (4, 2, 2)]
    inputs = [
        torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes
    ]
    output = attention(*inputs, None, packed_seq_params=make_row(MIXED, ROW_TOKENS, device))
    grads = torch.autograd.grad(output.square().sum(), inputs)
    return torch.cat([tensor.detach().flatten().cpu() for tensor in (output, *grads)])


def attended_under_sanitizer() -> bool:
    """Row attention under torch's check of streams; whether it finds a race made on purpose."""
    from torch.cuda._sanitizer import CUDASanitizerDispatchMode, CUDASanitizerErrors

    from megatron_idpo.testing.phantom_gpu.device import phantom

    with phantom(), CUDASanitizerDispatchMode():
        attended(16, "cuda")
        written = torch.arange(4.0, device="cuda").square()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                written.sum()
        except CUDASanitizerErrors:
            return True
    return False


# ---- tests --------------------------------------------------------------------------------------


def test_budget_names_the_lines_that_waited(gpu_workers: Any):
    (message,) = gpu_workers.run(budget_message, 1, 0)
    assert message.startswith("syncs: ") and "at most 0" in message
    assert "test_device.py:" in message and "waited" in message


def test_views_that_copy_are_computed_in_inference_mode(gpu_workers: Any):
    assert gpu_workers.run(copied_in_inference_mode, 1) == [2 * [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]


def test_equal_states_draw_equal_numbers(gpu_workers: Any):
    assert gpu_workers.run(random_numbers_differ_by_state, 1) == [True]


def test_collective_of_a_cpu_tensor_fails_as_with_nccl(gpu_workers: Any):
    (message,) = gpu_workers.run(collective_of_a_cpu_tensor, 1)
    assert "NCCL takes CUDA tensors" in message


def test_background_save_is_polled_on_the_gpu(gpu_workers: Any):
    assert min(gpu_workers.run(polled_save, 2)) > 0


def test_dropout_draws_its_mask_again_instead_of_keeping_it(gpu_workers: Any):
    ((dropped, grad, kept),) = gpu_workers.run(dropped_twice, 1)
    assert sorted(kept) == [2 * 32 * 32, 64 * 32]  # both matrices and the input, no mask
    assert torch.equal(dropped, grad)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75, 2 / 0.75])
    # Both masks drop an element with probability 0.25².
    share = float((dropped == 0).float().mean())
    assert abs(share - 0.0625) < 5 * math.sqrt(0.0625 * 0.9375 / dropped.numel())


def test_adapters_are_added_before_rounding_at_no_launch(gpu_workers: Any):
    ((exact, adapted, frozen, launches),) = gpu_workers.run(rounded_once, 1)
    assert launches == [2, 2, 2]  # two products; or zeros, and one product
    change = (adapted != frozen).float().mean()
    # To the nearest of 8 bits; a sum with a rounded output would be off by up to twice as much.
    error = (adapted.double() - exact).abs() / exact.abs().clamp(min=0.5)
    assert error.max() <= 2**-8 * 1.02 and change > 0.1


def test_full_memory_is_one_line_with_what_to_change(gpu_workers: Any):
    (message,) = gpu_workers.run(full_memory_message, 1)
    assert message.startswith("GPU memory: is full: Tried to allocate") and "\n" not in message
    assert all(name in message for name in ("row_tokens", "recompute", "layout.tensor"))


def test_mask_is_one_copy_that_the_host_does_not_wait_for(gpu_workers: Any):
    (counts,) = gpu_workers.run(mask_copies, 1)
    assert (counts.to_device, counts.pageable, counts.syncs) == (1, 0, 0)


def test_masks_are_used_on_the_stream_that_copies_them(gpu_workers: Any):
    """In a program: the sanitizer's callbacks stay in the process."""
    assert gpu_workers.run_as_program(attended_under_sanitizer, 1) == [True]


@pytest.mark.parametrize("head_dim", [8, 16])
def test_attention_on_a_gpu_equals_attention_on_the_cpu(gpu_workers: Any, head_dim):
    (ours,) = gpu_workers.run(attended, 1, head_dim, "cuda")
    (theirs,) = gpu_workers.run(attended, 1, head_dim, "cpu")
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)

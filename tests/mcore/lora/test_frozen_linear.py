"""Adapters of 16-bit linears count before the output is rounded; without them nothing changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.mcore.lora import frozen_linear as module
from megatron_idpo.mcore.lora.frozen_linear import frozen_linear
from megatron_idpo.mcore.lora.products import WHOLE, LowRank
from megatron_idpo.testing import tiny_hf_config

HALF_ULP = 0.5 + 1e-6
"""Of one rounding, in units in the last place."""

FP32_SUM = 1e-5
"""Error of a float32 sum of 64 products of order 1."""

TENSOR_CORE_SUM = 2.0**-24 / 8
"""The same per product and unit of the result on a GPU, whose tensor cores truncate: a unit in the
last place of the running sum for every eight products."""

SHARE = 0.1
"""How much the share of a change of a fifth of a unit that arrives may differ from 1, its standard
deviation being 0.01. Added to a rounded output, 0.4 to 0.5 of these changes arrive."""

GRADIENT_RELATIVE = 4e-3
"""|difference| / |gradient| after a rounding to bf16, 2^-9 at most for each value, twice."""

TOKENS, INPUTS, OUTPUTS, RANK = 700, 64, 96, 4
"""More positions than a CPU multiplies at a time."""

PARTS = ((slice(0, 32), 0, slice(0, 32)), (slice(64, 96), 1, slice(0, 32)))
"""Two matrices; the features between them have no adapter."""

DTYPES = (torch.bfloat16, torch.float16)


def last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of each value."""
    return torch.finfo(dtype).eps * 2.0 ** torch.frexp(values).exponent.double() / 2


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def product_case(
    parts: Any, dtype: torch.dtype, inputs: int = INPUTS
) -> tuple[Tensor, Tensor, LowRank]:
    """Input, weight and adapters that change the output by a fifth of a unit in its last place."""
    input_TI, weight_OI = (
        random_tensor(height, inputs, seed=seed, dtype=dtype)
        for seed, height in enumerate((TOKENS, OUTPUTS))
    )
    num = len(parts) if parts != WHOLE else 1
    height = OUTPUTS if num == 1 else 32
    low_rank_TR = random_tensor(TOKENS, RANK * num, seed=2, dtype=dtype)
    # |output| is 8 for 64 inputs and |low_rank @ up| twice |up|, on average.
    size = 0.2 * inputs**0.5 * torch.finfo(dtype).eps
    ups = [random_tensor(height, RANK, seed=3 + n, dtype=dtype) * size for n in range(num)]
    return input_TI, weight_OI, LowRank(low_rank_TR, ups, 0.5, parts)


def exact_delta(low_rank: LowRank) -> Tensor:
    delta_TO = torch.zeros(TOKENS, OUTPUTS, dtype=torch.float64)
    for features, index, rows in low_rank.parts:
        columns = low_rank.low_rank_TR[:, index * RANK : (index + 1) * RANK].double()
        delta_TO[:, features] = low_rank.scaling * columns @ low_rank.ups[index][rows].double().t()
    return delta_TO


@pytest.fixture(params=[True, False], ids=["16-bit products", "fp32 products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply; every CPU can use both."""
    monkeypatch.setattr(module, "multiplies_in_16_bits", lambda weight: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [WHOLE, PARTS])
@pytest.mark.usefixtures("products")
def test_the_sum_is_rounded_once_and_zeros_change_nothing(parts, dtype):
    assert_rounded_once(*product_case(parts, dtype), "cpu")


def assert_rounded_once(
    input_TI: Tensor, weight_OI: Tensor, low_rank: LowRank, device: str
) -> None:
    """Compare with the exact sum; and zeros with no adapters, bitwise."""
    dtype, delta_TO = weight_OI.dtype, exact_delta(low_rank)
    exact_TO = input_TI.double() @ weight_OI.double().t() + delta_TO
    input_T1I, weight_OI = input_TI[:, None].to(device), weight_OI.to(device)
    ups = [up.to(device) for up in low_rank.ups]
    low_rank = low_rank._replace(low_rank_TR=low_rank.low_rank_TR.to(device), ups=ups)
    output_TO = frozen_linear(input_T1I, weight_OI, None, low_rank)[:, 0].cpu()
    # Products in 16 bits round the low-rank product first.
    first_TO = torch.finfo(dtype).eps / 2 * delta_TO.abs()
    products = weight_OI.shape[1]
    sums = FP32_SUM * products / INPUTS
    if device == "cuda":
        sums = TENSOR_CORE_SUM * products * exact_TO.abs().clamp(min=products**0.5)
    error_TO = (output_TO.double() - exact_TO).abs() - first_TO - sums
    assert output_TO.dtype == dtype
    assert (error_TO / last_place(exact_TO, dtype)).max() <= HALF_ULP
    without = frozen_linear(input_T1I, weight_OI, None, None)
    zeros = low_rank._replace(ups=[torch.zeros_like(up) for up in ups])
    assert torch.equal(frozen_linear(input_T1I, weight_OI, None, zeros), without)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inputs", [INPUTS, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [WHOLE, PARTS])
def test_a_gpu_rounds_once(parts, dtype, inputs):
    assert_rounded_once(*product_case(parts, dtype, inputs), "cuda")


@pytest.mark.usefixtures("products")
def test_bias_is_added():
    input_TI, weight_OI, low_rank = product_case(WHOLE, torch.bfloat16)
    bias_O = random_tensor(OUTPUTS, seed=9)
    without_TO = frozen_linear(input_TI, weight_OI, None, low_rank)
    difference_TO = frozen_linear(input_TI, weight_OI, bias_O, low_rank) - (without_TO + bias_O)
    # Rounded once or twice.
    assert (difference_TO.abs() <= last_place(without_TO.abs() + 4, torch.bfloat16)).all()


@pytest.mark.parametrize("parts", [WHOLE, PARTS])
@pytest.mark.usefixtures("products")
def test_gradients_are_those_of_the_exact_sum(parts):
    input_TI, weight_OI, low_rank = product_case(parts, torch.bfloat16)
    leaves = [input_TI, low_rank.low_rank_TR, *low_rank.ups]
    grad_TO = random_tensor(TOKENS, OUTPUTS, seed=9)
    for leaf in leaves:
        leaf.requires_grad_()
    output_TO = frozen_linear(input_TI, weight_OI, None, low_rank)
    found = torch.autograd.grad(output_TO, leaves, grad_TO)
    exact_TO = input_TI.double() @ weight_OI.double().t() + exact_delta(low_rank)
    expected = torch.autograd.grad(exact_TO, leaves, grad_TO.double())
    for gradient, exact in zip(found, expected, strict=True):
        assert (gradient - exact).norm() <= GRADIENT_RELATIVE * exact.norm()


@pytest.mark.usefixtures("products")
def test_adapters_get_gradients_if_the_input_needs_none():
    input_TI, weight_OI, low_rank = product_case(WHOLE, torch.bfloat16)
    low_rank.ups[0].requires_grad_()
    frozen_linear(input_TI, weight_OI, None, low_rank).sum().backward()
    assert low_rank.ups[0].grad is not None and input_TI.grad is None


# ---- in a layer, in every layout ----------------------------------------------------------------


def seeded(values: Tensor, seed: int, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values.normal_(std=std, generator=generator)


def share_of_change(layout: Layout) -> dict[str, float]:
    """By linear: the share of a small true change of its output that arrives."""
    import torch.distributed as dist

    from megatron_idpo.mcore.lora.chunk import FUSED, freeze, insert_adapters
    from megatron_idpo.mcore.lora.linear import LoraHyperparams
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(layout, seed=1)
    architecture = Architecture.from_hf(tiny_hf_config("llama"))
    (chunk,) = build_model(architecture, layout, ModelOptions(dtype=torch.bfloat16))
    freeze(chunk)
    targets = [name for fused in FUSED.values() for name in fused]
    adapters = insert_adapters(chunk, targets, LoraHyperparams(RANK, 1.0, 0.0))
    rank, size = dist.get_rank(), layout.tensor
    shares = {}
    for name, of_linear in adapters.layers[0].items():
        linear, is_column = of_linear.linear, of_linear.is_column_parallel
        outputs, inputs = linear.weight.shape
        # Replicated tensors are the same on all ranks, the others are not.
        seeded(linear.weight.data, 10 + rank, inputs**-0.5)
        for index, target in enumerate(of_linear.targets):
            seeded(of_linear.down(target).data, index if is_column else 20 + rank, inputs**-0.5)
        input_T1I = seeded(torch.empty(TOKENS, 1, inputs), 0 if is_column else 30 + rank, 1.0)
        input_T1I = input_T1I.bfloat16()
        is_sharded = layout.sequence_parallel
        local_t1I = input_T1I.chunk(size)[rank] if is_column and is_sharded else input_T1I
        with torch.no_grad():
            before_t1O = linear(local_t1I)[0]
            for index, target in enumerate(of_linear.targets):
                up = of_linear.up(target).data
                seeded(up, 40 + index + (rank if is_column else 0), 0.2 * 2**-8 / 2)
            changed_t1O = (linear(local_t1I)[0] - before_t1O).double()
            up_OR, down_RI = of_linear.fused_up().double(), of_linear.fused_down().double()
        low_TR = input_T1I[:, 0].double() @ down_RI.t()
        if not is_column:
            dist.all_reduce(low_TR)
        delta_TO = low_TR @ up_OR.t()
        if not is_column and is_sharded:
            delta_TO = delta_TO.chunk(size)[rank]
        assert changed_t1O.shape[-1] == outputs
        share = (changed_t1O[:, 0] * delta_TO).sum() / delta_TO.square().sum()
        shares[name] = float(share)
    return shares


LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_change_below_the_last_place_arrives(layout, workers):
    for shares in workers.run(share_of_change, layout.model_ranks, layout):
        assert all(abs(share - 1) <= SHARE for share in shares.values()), shares

"""`vocab_parallel_logprobs` against float64 `log_softmax` of whole logits, on 1 to 4 ranks."""

import importlib.util
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.plugin.logprobs import vocab_parallel_logprobs
from megatron_idpo.plugin.tiles import TileSizes

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Gradients are rounded to their dtype once (bf16: by 2^-9 of an element at most), and with several
ranks once more each. The limit in bf16 is 0.3 %. float32 has the rounding of sums."""

LOGPS = {torch.float64: 1e-12}
LOGPS_DEFAULT = 2e-6
"""Log-probabilities are float32 from unrounded products, also of 16-bit inputs."""


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def inputs(num_tokens, vocab, hidden, dtype, spread=2.0):
    """Hidden states, weight and gradients; logits have a standard deviation of `spread`."""
    hidden_NH = torch.randn(num_tokens, hidden).to(dtype)
    weight_VH = (spread * torch.randn(vocab, hidden) / hidden**0.5).to(dtype)
    targets_N = torch.randint(0, vocab, (num_tokens,))
    return hidden_NH, weight_VH, targets_N, torch.randn(num_tokens)


def reference(hidden_NH, weight_VH, targets_N, grad_N, formula=lambda logits: logits):
    """Log-probabilities and gradients of hidden states and weight, by autograd in float64."""
    hidden_NH = hidden_NH.detach().double().requires_grad_()
    weight_VH = weight_VH.detach().double().requires_grad_()
    logits_NV = formula(hidden_NH @ weight_VH.t())
    logps_N = logits_NV.log_softmax(1).gather(1, targets_N[:, None])[:, 0]
    logps_N.backward(grad_N.double())
    return logps_N.detach(), hidden_NH.grad, weight_VH.grad


def computed(hidden_NH, weight_VH, targets_N, grad_N, *, frozen, **options):
    hidden_NH = hidden_NH.detach().requires_grad_()
    weight_VH = weight_VH.detach().requires_grad_(not frozen)
    logps_N = vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N, **options)
    logps_N.backward(grad_N.to(logps_N.dtype))
    return logps_N.detach(), hidden_NH.grad, weight_VH.grad


def check(got, expected, dtype):
    for name, value, true in zip(("logps", "hidden", "weight"), got, expected, strict=True):
        if value is None:
            continue
        limit = LOGPS.get(dtype, LOGPS_DEFAULT) if name == "logps" else RELATIVE[dtype]
        assert relative(value, true) <= limit, f"{name}: {relative(value, true):.2e} > {limit}"


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_log_probabilities_and_gradients_equal_float64(dtype, frozen):
    torch.manual_seed(0)
    tensors = inputs(23, 101, 48, dtype)
    got = computed(*tensors, frozen=frozen, tiles=TileSizes(10, 32))
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == dtype and (got[2] is None) == frozen
    check(got, reference(*tensors), dtype)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    ("logit_map", "formula"),
    [
        (LogitMap(0.4), lambda x: 0.4 * x),
        (LogitMap(0.5, cap=1.5), lambda x: 1.5 * torch.tanh(0.5 * x / 1.5)),
        (LogitMap(0.5, 1.5).sharpened(2), lambda x: 3.0 * torch.tanh(0.5 * x / 1.5)),
        (LogitMap(0.4).sharpened(2), lambda x: 0.8 * x),
    ],
    ids=["factor", "cap", "sharp-cap", "sharp-factor"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_mapped_logits_equal_float64(dtype, logit_map, formula, frozen):
    torch.manual_seed(0)
    tensors = inputs(23, 101, 48, dtype)
    got = computed(*tensors, frozen=frozen, tiles=TileSizes(10, 32), logit_map=logit_map)
    check(got, reference(*tensors, formula), dtype)


@given(
    num_tokens=st.integers(0, 9),
    vocab=st.integers(1, 40),
    hidden=st.integers(1, 9),
    tiles=st.builds(TileSizes, st.integers(1, 12), st.integers(1, 50)),
    padding=st.integers(0, 5),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    frozen=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_in_any_tiles(num_tokens, vocab, hidden, tiles, padding, spread, frozen):
    torch.manual_seed(0)
    hidden_NH, weight_VH, targets_N, grad_N = inputs(
        num_tokens, vocab, hidden, torch.float64, spread
    )
    padded_VH = torch.cat((weight_VH, torch.full((padding, hidden), 1e3, dtype=torch.float64)))
    got = computed(
        hidden_NH, padded_VH, targets_N, grad_N, frozen=frozen, vocab_valid=vocab, tiles=tiles
    )
    expected = reference(hidden_NH, weight_VH, targets_N, grad_N)
    for value, true in zip(got, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value[: len(true)], true, rtol=1e-9, atol=1e-9)
            assert not value[len(true) :].any()  # padding's gradient


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_gradcheck(frozen):
    torch.manual_seed(0)
    hidden_NH, weight_VH, targets_N, _ = inputs(5, 11, 4, torch.float64)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_(not frozen)

    def logps(hidden_NH, weight_VH):
        return vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N, tiles=TileSizes(2, 4))

    assert gradcheck(logps, (hidden_NH, weight_VH))


def test_only_inputs_that_require_a_gradient_get_one():
    torch.manual_seed(0)
    hidden_NH, weight_VH, targets_N, grad_N = inputs(6, 20, 8, torch.float32)
    expected = reference(hidden_NH, weight_VH, targets_N, grad_N)
    weight_VH.requires_grad_()
    vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N).backward(grad_N)
    check((expected[0], None, weight_VH.grad), expected, torch.float32)

    weight_VH.grad = None
    hidden_NH.requires_grad_()
    vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N, frozen=True).backward(grad_N)
    assert weight_VH.grad is None
    check((expected[0], hidden_NH.grad, None), expected, torch.float32)

    hidden_NH.grad = None
    weight_VH.requires_grad_(False)  # the recomputing path works for a frozen weight too
    vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N, frozen=False).backward(grad_N)
    check((expected[0], hidden_NH.grad, None), expected, torch.float32)


def on_rank(case):
    """One rank's log-probabilities, hidden gradient and rows of the weight's gradient."""
    torch.manual_seed(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    num_tokens, vocab, hidden, dtype = case["shape"]
    hidden_NH, weight_VH, targets_N, grad_N = inputs(num_tokens, vocab, hidden, dtype)
    rows = -(-(vocab + case["padding"]) // size)
    padded_VH = torch.full((rows * size, hidden), 50.0, dtype=dtype)
    padded_VH[:vocab] = weight_VH
    shard = padded_VH[rank * rows : (rank + 1) * rows]
    options = {
        "vocab_start": rank * rows,
        "vocab_valid": vocab,
        "group": dist.group.WORLD,
        "reduce_hidden_grad": case["reduce"],
        "tiles": TileSizes(7, 9),
    }
    with (
        patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gather,
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        logps_N, hidden_grad, weight_grad = computed(
            hidden_NH, shard, targets_N, grad_N, frozen=case["frozen"], **options
        )
    calls = (gather.call_count, reduce.call_count)
    if not case["reduce"]:  # as the backward of a sequence-parallel gather does
        dist.all_reduce(hidden_grad)
    if weight_grad is not None:
        weight_grad = weight_grad[: max(vocab - rank * rows, 0)]
    return logps_N, hidden_grad, weight_grad, calls


def cases():
    for dtype, frozen in itertools.product((torch.float64, torch.bfloat16), (True, False)):
        reduce = (dtype == torch.bfloat16) == frozen
        yield {
            "shape": (19, 61, 24, dtype), "padding": 2, "frozen": frozen, "reduce": reduce,
        }  # fmt: skip
    common = {"padding": 0}
    yield {"shape": (0, 61, 24, torch.float32), "frozen": True, "reduce": True, **common}
    yield {"shape": (0, 61, 24, torch.float32), "frozen": False, "reduce": False, **common}
    # Five tokens on four ranks: two rows each, so the last rank has only padding.
    yield {"shape": (6, 5, 8, torch.float32), "frozen": True, "reduce": False, **common}
    yield {"shape": (6, 5, 8, torch.float32), "frozen": False, "reduce": True, **common}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_sharing_the_vocabulary_equal_float64(workers, world_size):
    for case in cases():
        torch.manual_seed(1)
        num_tokens, *_, dtype = case["shape"]
        expected = reference(*inputs(*case["shape"]))
        results = workers.run(on_rank, world_size, case)
        rows = [weight_grad for *_, weight_grad, _ in results if weight_grad is not None]
        weight_grad = torch.cat(rows) if rows else None
        assert (weight_grad is None) == case["frozen"]
        for logps_N, hidden_grad, _, calls in results:
            assert logps_N.shape == (num_tokens,)
            check((logps_N, hidden_grad, weight_grad), expected, dtype)
            torch.testing.assert_close(logps_N, results[0][0], rtol=0, atol=0)
            expected_calls = (1, int(case["reduce"])) if world_size > 1 else (0, 0)
            assert calls == expected_calls, case


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_zero_targets_are_connected_to_the_graph(frozen):
    hidden_NH = torch.randn(0, 8, requires_grad=True)
    weight_VH = torch.randn(20, 8, requires_grad=not frozen)
    targets_N = torch.zeros(0, dtype=torch.int64)
    vocab_parallel_logprobs(hidden_NH, weight_VH, targets_N).sum().backward()
    assert hidden_NH.grad.shape == (0, 8)
    assert frozen or (weight_VH.grad.shape == (20, 8) and not weight_VH.grad.any())


def confident_tokens(probabilities, vocab=600, hidden=64):
    """bf16 hidden states that give their targets about these probabilities.

    Rows share a common component, as real embeddings do; it cancels in W[y] − E[W].
    """
    weight_VH = (torch.randn(vocab, hidden) + 0.5 * torch.randn(hidden)).bfloat16()
    targets_N = torch.arange(len(probabilities))
    hidden_NH = torch.randn(len(probabilities), hidden) / hidden**0.5
    direction_NH = (weight_VH[targets_N] - weight_VH.float().mean(0)).double()
    low, high = torch.zeros(len(probabilities)), torch.full((len(probabilities),), 3.0)
    for _ in range(40):  # p grows with the part of W[y] in the hidden state: bisect
        middle = (low + high) / 2
        mixed_NH = hidden_NH + middle[:, None] * direction_NH
        p = (mixed_NH @ weight_VH.double().t()).softmax(1)[targets_N, targets_N]
        too_low = p < probabilities
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return mixed_NH.bfloat16(), weight_VH, targets_N


def direct_gradient(hidden_NH, weight_VH, targets_N):
    """W[y] − Σ_v p_v W[v] with bf16 probabilities and float32 sums."""
    p_NV = (hidden_NH.float() @ weight_VH.float().t()).softmax(1).bfloat16().float()
    return (weight_VH[targets_N].float() - p_NV @ weight_VH.float()).bfloat16()


def test_bf16_gradients_of_confident_tokens():
    """Within 0.3 % of float64 for every token, where the direct formula is off by percents."""
    torch.manual_seed(0)
    probabilities = torch.tensor([0.3, 0.9, *(1 - 2.0 ** -torch.arange(4, 17)).tolist()])
    hidden_NH, weight_VH, targets_N = confident_tokens(probabilities)
    ones_N = torch.ones(len(targets_N))
    logps_N, expected_NH, _ = reference(hidden_NH, weight_VH, targets_N, ones_N)
    assert (logps_N.exp() > 0.95).sum() >= 10, logps_N.exp()
    for tiles in (TileSizes(4, 100), TileSizes(64, 1024)):
        _, grad_NH, _ = computed(hidden_NH, weight_VH, targets_N, ones_N, frozen=True, tiles=tiles)
        errors = (grad_NH.double() - expected_NH).norm(dim=1) / expected_NH.norm(dim=1)
        assert errors.max() <= RELATIVE[torch.bfloat16], errors
    direct_NH = direct_gradient(hidden_NH, weight_VH, targets_N).double()
    errors = (direct_NH - expected_NH).norm(dim=1) / expected_NH.norm(dim=1)
    assert errors[logps_N.exp() > 0.95].median() > 0.01, errors


@pytest.mark.parametrize(
    ("frozen", "grad", "products"), [(True, True, 4), (False, True, 8), (True, False, 2)]
)
def test_flops_match_the_documented_formula(frozen, grad, products):
    tensors = inputs(20, 50, 16, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        if grad:
            computed(*tensors, frozen=frozen, tiles=TileSizes(8, 16))
        else:
            vocab_parallel_logprobs(*tensors[:3], tiles=TileSizes(8, 16))
    assert counter.get_total_flops() == products * 20 * 50 * 16


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_whole_logits_are_never_allocated(frozen):
    """Nothing is larger than the inputs or a tile: the largest input has 400 * 16 elements."""
    tensors = inputs(300, 400, 16, torch.bfloat16)
    with LargestTensor() as largest:
        computed(*tensors, frozen=frozen, tiles=TileSizes(70, 80))
    assert largest.elements == 400 * 16 < 300 * 400 / 10


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_peak_memory_at_full_size(frozen):
    """The benchmark's bound for 8192 targets, hidden size 4096, Qwen's vocabulary, bf16."""
    path = Path(__file__).parents[2] / "benchmarks" / "head.py"
    spec = importlib.util.spec_from_file_location("benchmarks_head", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = benchmark.Sizes.parse("8192x4096x151936", torch.bfloat16)
    assert 0 < benchmark.extra_bytes(sizes, "gpu", frozen=frozen) <= 300e6


def test_onednn_setting_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    computed(*inputs(4, 9, 8, torch.bfloat16), frozen=False)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gpu_equals_float64(dtype, frozen):
    torch.manual_seed(0)
    tensors = inputs(300, 1001, 128, dtype)
    options = {"vocab_valid": 1001, "tiles": TileSizes(128, 400)}
    got = computed(*(tensor.cuda() for tensor in tensors), frozen=frozen, **options)
    got = tuple(None if value is None else value.cpu() for value in got)
    check(got, reference(*tensors), dtype)

"""A head computes what final norm and output layer compute.

Heads over several ranks are tested against the oracle in `test_attach.py`.
"""

import pytest
import torch

from megatron_idpo.mcore.model.specs import RMSNorm
from megatron_idpo.plugin.head import Head
from megatron_idpo.plugin.targets import Targets

ROWS, VALID, HIDDEN, POSITIONS = 13, 11, 8, 9
ATOL = 1e-6
"""Sums of a handful of fp32 logarithms."""

TARGETS = Targets(
    positions_N=torch.tensor([5, 0, 5, 7]),
    tokens_N=torch.tensor([1, 10, 4, 0]),
    sequences_N=torch.tensor([0, 1, 0, 1]),
    num_sequences=2,
    shape=(1, POSITIONS),
)


@pytest.fixture
def norm():
    norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return norm


@pytest.fixture
def weight_VH():
    return torch.nn.Parameter(torch.randn(ROWS, HIDDEN))


def head(norm, weight_VH, **fields):
    return Head(
        norm=norm,
        weight=fields.pop("weight", lambda: weight_VH),
        group=None,
        vocab_start=0,
        vocab_size=VALID,
        sequence_parallel=False,
        **fields,
    )


def expected(hidden_T1H, norm, weight_VH):
    """From the logits of every position, without padding rows."""
    logps_TV = torch.log_softmax(norm(hidden_T1H[:, 0]) @ weight_VH[:VALID].t(), dim=-1)
    picked_N = logps_TV[TARGETS.positions_N, TARGETS.tokens_N]
    return torch.stack([picked_N[[0, 2]].sum(), picked_N[[1, 3]].sum()])


@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_log_probabilities_and_gradients(norm, weight_VH, use_norm, normed):
    hidden_T1H = torch.randn(POSITIONS, 1, HIDDEN, requires_grad=True)
    through = norm if use_norm and not normed else torch.nn.Identity()
    parameters = [hidden_T1H, weight_VH, norm.weight]
    truth_2P = expected(hidden_T1H, through, weight_VH)
    truth = torch.autograd.grad(truth_2P @ torch.tensor([1.0, -2.0]), parameters, allow_unused=True)
    logps_2P = head(norm, weight_VH, use_norm=use_norm).sequence_logps(
        hidden_T1H, TARGETS, normed=normed
    )
    assert logps_2P.dtype == torch.float32
    assert torch.allclose(logps_2P, truth_2P, atol=ATOL)
    (logps_2P @ torch.tensor([1.0, -2.0])).backward()
    for parameter, gradient in zip(parameters, truth, strict=True):
        if gradient is None:
            assert parameter.grad is None, "the norm was applied"
        else:
            assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_frozen_weight_passes_gradient_to_the_hidden_state_only(norm, weight_VH):
    weight_VH.requires_grad_(False)
    hidden_T1H = torch.randn(POSITIONS, 1, HIDDEN, requires_grad=True)
    logps_2P = head(norm, weight_VH).sequence_logps(hidden_T1H, TARGETS, normed=False)
    logps_2P.sum().backward()
    assert weight_VH.grad is None and hidden_T1H.grad.count_nonzero()


def test_empty_row_is_connected_to_the_graph(norm, weight_VH):
    empty = torch.zeros(0, dtype=torch.int64)
    hidden_T1H = torch.randn(POSITIONS, 1, HIDDEN, requires_grad=True)
    logps_2P = head(norm, weight_VH).sequence_logps(
        hidden_T1H, Targets(empty, empty, empty, 0, shape=(1, POSITIONS)), normed=False
    )
    assert logps_2P.shape == (0,)
    logps_2P.sum().backward()
    for parameter in (hidden_T1H, weight_VH, norm.weight):
        assert parameter.grad is not None and not parameter.grad.any()


def test_wider_residual_is_cast_to_the_weights_dtype(weight_VH):
    """As with `fp32_residual_connection`."""

    class Config:
        use_cpu_initialization, sequence_parallel, params_dtype = True, False, torch.float32
        layernorm_zero_centered_gamma = False

    half_VH = weight_VH.detach().bfloat16()
    hidden_T1H = torch.randn(POSITIONS, 1, HIDDEN)
    bf16_head = head(RMSNorm(Config(), HIDDEN), half_VH)
    logps_2P = bf16_head.sequence_logps(hidden_T1H, TARGETS, normed=False)
    truth_2P = expected(hidden_T1H, RMSNorm(Config(), HIDDEN), weight_VH.detach())
    # bf16 keeps 8 bits of operands of about 1, in sums of 8 products.
    assert logps_2P.dtype == torch.float32 and (logps_2P - truth_2P).abs().max() < 0.2


def test_weight_is_looked_up_at_each_use(norm, weight_VH):
    """DDP moves parameters into its buffers after heads are created."""
    lookups = []
    lazy_head = head(norm, weight_VH, weight=lambda: lookups.append(1) or weight_VH)
    assert not lookups
    lazy_head.sequence_logps(torch.randn(POSITIONS, 1, HIDDEN), TARGETS, normed=False)
    assert lookups == [1]


def test_enter_calls_the_replica_as_a_module(norm, weight_VH):
    entered = []
    replica = head(norm, weight_VH, replica=lambda: entered.append(1))
    for evaluates_now in (False, True):
        replica.enter(evaluates_now=evaluates_now)
    assert entered == [1, 1]
    head(norm, weight_VH).enter(evaluates_now=True)


def test_enter_waits_for_the_owners_weight_before_an_evaluation(norm, weight_VH):
    """As DDP's hooks do; in training the owner runs before the backward pass uses its weight."""
    owner, waited = torch.nn.Linear(1, 1), []
    owner.register_forward_pre_hook(lambda module, *_: waited.append(module))
    head(norm, weight_VH, owner=owner).enter(evaluates_now=False)
    assert waited == []
    head(norm, weight_VH, owner=owner).enter(evaluates_now=True)
    assert waited == [owner]

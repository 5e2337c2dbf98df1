"""Stock Megatron-Core's random numbers, recomputation and checkpoints on redirected CPUs."""

import pytest
import torch

pytestmark = pytest.mark.distributed

COLUMNS = 32


def start(tensor=1):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor)
    model_parallel_cuda_manual_seed(123)


def dropout_masks(tensor):
    """Dropout masks drawn inside and outside forks, and whether a fork restores the generator."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    start(tensor)
    ones = torch.ones(64, device="cuda")
    tracker = get_cuda_rng_tracker()
    before = torch.cuda.get_rng_state()
    with tracker.fork():
        first = torch.nn.functional.dropout(ones)
        with tracker.fork("expert-parallel-rng"):
            torch.nn.functional.dropout(ones)
    restored = torch.equal(torch.cuda.get_rng_state(), before)
    with tracker.fork():
        second = torch.nn.functional.dropout(ones)
    outside = torch.nn.functional.dropout(ones)
    return restored, first, second, outside


def test_rng_forks_differ_over_tensor_ranks_and_restore_the_generator(workers, capfd):
    one, other = workers.run(dropout_masks, 2, 2)
    assert one[0] and other[0], "a fork changed the generator outside"
    assert not torch.equal(one[1], other[1]), "forked masks must differ over tensor ranks"
    assert not torch.equal(one[1], one[2]), "a fork must continue where the last one ended"
    assert torch.equal(one[3], other[3]), "unforked masks must agree over tensor ranks"
    replica, same = workers.run(dropout_masks, 2, 1)
    assert torch.equal(replica[1], same[1]), "data-parallel ranks must fork the same stream"
    assert "CPU RNG state changed" not in capfd.readouterr().err


def recompute_on_cuda(kind):
    """Gradients of a function that creates tensors on CUDA, with and without recomputation."""
    from megatron.core.tensor_parallel import checkpoint
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    start()
    calls = []

    def compute(x):
        calls.append(torch.is_grad_enabled())
        mask = torch.ones(4, 4, device="cuda").tril()
        index = torch.arange(4, device=torch.cuda.current_device())
        scale = torch.tensor(2.0, device="cuda:0").to("cuda").cuda()
        with get_cuda_rng_tracker().fork():
            dropped = torch.nn.functional.dropout(x.new_ones(4, device="cuda") * x)
        return (mask @ dropped * scale + index).square()

    gradients = []
    for recompute in (False, True):
        torch.cuda.manual_seed(7)
        get_cuda_rng_tracker().reset()
        get_cuda_rng_tracker().add("model-parallel-rng", 11)
        x = torch.arange(4.0).requires_grad_()
        output = checkpoint(compute, False, x) if recompute else compute(x)
        if kind == "method":
            output.sum().backward()
        else:
            torch.autograd.backward(output, torch.ones_like(output))
        gradients.append(x.grad)
    return calls, *gradients


@pytest.mark.parametrize("kind", ["method", "function"])
def test_recomputation_in_backward_creates_tensors_on_the_cpu(workers, kind):
    ((calls, plain_gradient, gradient),) = workers.run(recompute_on_cuda, 1, kind)
    assert calls == [True, False, True], "the second run recomputes in backward"
    assert torch.equal(gradient, plain_gradient), "recomputation must draw the same dropout mask"
    assert gradient.count_nonzero() > 0


def build():
    """A column-parallel layer, whose weight is sharded over tensor ranks."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.tensor_parallel import ColumnParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        gradient_accumulation_fusion=False,
    )
    return ColumnParallelLinear(8, COLUMNS, config=config, init_method=torch.nn.init.normal_)


def sharded_state(layer):
    from megatron.core.parallel_state import get_data_parallel_group

    group = get_data_parallel_group(with_context_parallel=True)
    return layer.sharded_state_dict(metadata={"dp_cp_group": group})


def full_weight(layer):
    """The layer's full weight, on every rank."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(layer.weight.t()).t()


def save(tensor, directory, asynchronous):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    start(tensor)
    layer = build()
    saved = full_weight(layer).clone()
    request = dist_checkpointing.save(
        sharded_state(layer), directory, async_sharded_save=asynchronous, async_strategy="mcore"
    )
    if asynchronous:
        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        # Later changes must not reach the checkpoint.
        with torch.no_grad():
            layer.weight.fill_(7.0)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    return saved


def load(tensor, directory):
    from megatron.core import dist_checkpointing

    start(tensor)
    layer = build()
    loaded = dist_checkpointing.load(sharded_state(layer), directory)
    layer.load_state_dict(loaded)
    return full_weight(layer)


# Asynchronously megatron-core starts processes that import it again; we save on a thread.
@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_checkpoint_loads_into_another_layout(workers, tmp_path, asynchronous):
    saved, same = workers.run(save, 2, 2, str(tmp_path), asynchronous)
    assert saved.shape == (COLUMNS, 8) and torch.equal(saved, same)
    assert not torch.equal(saved[: COLUMNS // 2], saved[COLUMNS // 2 :])
    for tensor in (2, 1):
        for loaded in workers.run(load, 2, tensor, str(tmp_path)):
            assert torch.equal(loaded, saved)

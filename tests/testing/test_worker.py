"""A worker's results, exceptions and cleanup after a call."""

import os
import threading

import pytest
import torch

from megatron_idpo.errors import ConfigError
from megatron_idpo.testing import WorkerError

pytestmark = pytest.mark.distributed


def process_id():
    return os.getpid()


def return_tensors():
    base = torch.arange(1000.0)
    return {
        "view": base[3:5],
        "bf16": base[:3].bfloat16().reshape(3, 1).t(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "leaf": torch.nn.Parameter(base[:2].clone()),
        "graph": (base[:2].clone().requires_grad_() * 2),
    }


def start_megatron(tensor):
    from megatron.core import parallel_state

    from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor)
    assert redirect_cuda_to_cpu()
    return torch.zeros(1, device="cuda").device, torch.get_num_threads()


def fail_on_rank(failing_rank, kind):
    if torch.distributed.get_rank() == failing_rank:
        raise kind("the reason")
    # The other rank waits for it, as in a pipeline.
    torch.distributed.barrier()


class Unpicklable(Exception):
    def __init__(self, reason):
        super().__init__(reason)
        self.lock = threading.Lock()


def test_returned_tensors_are_compact_copies(workers):
    (tensors,) = workers.run(return_tensors, 1)
    assert tensors["view"].tolist() == [3.0, 4.0]
    assert tensors["view"].untyped_storage().nbytes() == 8
    assert tensors["bf16"].dtype == torch.bfloat16 and tensors["bf16"].tolist() == [[0.0, 1.0, 2.0]]
    assert tensors["scalar"].shape == () and tensors["scalar"].item() == 7
    assert tensors["empty"].shape == (0, 4)
    assert isinstance(tensors["leaf"], torch.nn.Parameter) and tensors["leaf"].requires_grad
    assert tensors["graph"].tolist() == [0.0, 2.0]


def test_megatron_state_is_reset_after_a_call(workers):
    for tensor in (2, 1):
        assert workers.run(start_megatron, 2, tensor) == [(torch.device("cpu"), 1)] * 2


@pytest.mark.parametrize(
    ("failing_rank", "kind"), [(0, ValueError), (1, ConfigError), (1, SystemExit)]
)
def test_exception_is_raised_with_its_rank_and_traceback(workers, failing_rank, kind):
    before = workers.run(process_id, 2)
    with pytest.raises(kind, match="the reason") as raised:
        workers.run(fail_on_rank, 2, failing_rank, kind)
    (note,) = raised.value.__notes__
    assert note.startswith(f"rank {failing_rank} of 2 raised:")
    assert "in fail_on_rank" in note
    assert workers.run(process_id, 2) == before, "workers are kept after a failed call"


def test_unpicklable_exception_is_raised_as_a_worker_error(workers):
    with pytest.raises(WorkerError, match=r"Unpicklable: the reason(.|\n)*in fail_on_rank"):
        workers.run(fail_on_rank, 1, 0, Unpicklable)

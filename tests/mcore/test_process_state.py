import pytest
import torch

from megatron_idpo.mcore.parallel.groups import reset_megatron_state


def start_and_forget():
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker, random

    def fail(x):
        raise ValueError

    for _ in range(2):  # The second round would find what the first left.
        parallel_state.initialize_model_parallel()
        random.model_parallel_cuda_manual_seed(1)
        num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
        with pytest.raises(ValueError):
            checkpoint(fail, False, torch.ones(1, requires_grad=True))
        assert random.is_checkpointing()
        reset_megatron_state()
        reset_megatron_state()
        assert not parallel_state.is_initialized()
        assert not random.is_checkpointing()
        assert get_cuda_rng_tracker().get_states() == {}
    return torch.distributed.is_initialized()


@pytest.mark.distributed
def test_nothing_is_left_and_forgetting_twice_is_harmless(workers):
    assert workers.run(start_and_forget, 1) == [True]

"""What Megatron-Core keeps per process, and how to drop it.

Process groups, the RNG tracker, the number of micro-batches and a recomputation flag are module
globals in Megatron-Core: a process that runs one job after another, like the workers of
`megatron_idpo.testing`, has to reset them, also after a job that failed in the middle. A running
program that started a `Layout` stops that instead.
"""


def forget_megatron_state() -> None:
    """Drop Megatron-Core's process-wide state, whatever there is of it.

    No collective is involved, and torch.distributed's default group stays.
    """
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    # There is no function for these two; the next seeding makes a new tracker.
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    random._unset_checkpointing()

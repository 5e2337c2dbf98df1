"""Random numbers as a function of the step, so that there is no random state to save.

Before every step the generators of megatron-core's tracker and torch's own are seeded anew from
(seed, step, place). A resumed run draws what an unbroken one draws, and whatever happens between
steps (an evaluation, a look at a sample) changes nothing.
"""

import hashlib

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_idpo.mcore.parallel.groups import this_rank

_STAGES = 100_000
"""Distance between the seeds of stages; tensor-parallel ranks differ by less."""


def seed_step(seed: int, step: int) -> None:
    """Seed this rank's generators for one step. Not collective.

    Tensor-parallel ranks share torch's own generator and differ in the tracker's; stages and data-
    parallel ranks differ in both.

    Args:
        seed: of the run.
        step: of the optimizer, any integer.
    """
    rank = this_rank()
    message = f"{seed}/{step}/{rank.data}".encode()
    drawn = int.from_bytes(hashlib.blake2b(message, digest_size=4).digest())
    model_parallel_cuda_manual_seed(drawn + _STAGES * (1 + rank.pipeline))

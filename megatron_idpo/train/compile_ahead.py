"""Compiles a GPU's kernels for every row length before the first step.

A row length that is first met in the middle of a run is compiled then, for tens of seconds, while
all other ranks wait in a collective. Here each length is run once, forward and backward, with the
model itself, so that exactly the kernels of a step are compiled. Inductor keeps them in a directory
that the ranks of a node share (TORCHINDUCTOR_CACHE_DIR).
"""

import time
from collections.abc import Sequence

import numpy as np
import torch

from megatron_idpo.data.packing.batches import Batch, RowSettings
from megatron_idpo.data.packing.plan import row_lengths
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import Pair
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.plugin.batch_run import run_batch
from megatron_idpo.train.policy import Policy


def compile_ahead(policy: Policy, rows: RowSettings) -> tuple[Sequence[int], float] | None:
    """Run a row of every length through the policy, with and without gradient. Collective.

    Gradients are left in DDP's buffers, which a step zeroes first; weights do not change.

    Returns:
        The lengths and the seconds that it took; None on a CPU, where nothing is compiled.
    """
    if default_device().type == "cpu":
        return None
    start_s = time.perf_counter()
    lengths = row_lengths(rows.row_tokens, rows.trim_tokens)
    for row_tokens in lengths:
        batch = _smallest_batch(row_tokens, rows)
        # As before a step: DDP learns from its first backward pass how often each gradient is
        # added before it is complete, and waits for as many in every step.
        policy.trainable.zero_grad_buffers()
        for training in (False, True):
            run_batch(
                policy.dpo,
                policy.trainable.model,
                batch,
                None,
                training=training,
                reference_free=training,
            )
    # All ranks had the same row until now; in the first step, their own data.
    policy.dpo.check_next_step()
    torch.cuda.synchronize()
    return lengths, time.perf_counter() - start_s


def _smallest_batch(row_tokens: int, rows: RowSettings) -> Batch:
    """One pair of single tokens in each row, as few rows as the pipeline takes."""
    token = np.zeros(1, np.int32)
    pair = Pair(prompt_tokens=token, chosen_tokens=token, rejected_tokens=token, index=0)
    row = Row.build([pair], row_tokens, rows.pad_token, share_prompt=rows.share_prompt)
    num_pairs = rows.rows_multiple * rows.data_size
    return Batch(
        rows=(row,) * rows.rows_multiple,
        num_pairs=num_pairs,
        chosen_tokens=num_pairs,
        consumed_pairs=0,
        used_tokens=3,
        computed_tokens=row_tokens,
    )

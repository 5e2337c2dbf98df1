"""One training step of a layout that fits no machine: its memory, launches, waits and CPU time.

In a process on a phantom GPU without arithmetic, as one rank of a world of which no other rank
exists.
"""

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.world import running_layout
from megatron_idpo.testing.phantom_gpu.counters import Counts
from megatron_idpo.testing.phantom_gpu.device import phantom
from megatron_idpo.testing.random_step import full_batch, random_step, state_bytes


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """The second step of a process."""

    counts: Counts
    cpu_s: float
    """Of the process, to issue the step."""

    weight_bytes: int
    """Of the base model on this rank, without copies of the head."""

    adapter_bytes: int
    head_copy_bytes: int
    gradient_bytes: int
    """DDP's buffers."""

    optimizer_bytes: int
    """Moments, and main parameters where they are copies."""

    other_bytes: int
    """What else is allocated between steps: the workspace of matrix products, constants."""

    step_bytes: int
    """The allocator's peak within the step, above what is allocated between steps."""

    @property
    def peak_bytes(self) -> int:
        """The allocator's peak."""
        held = self.weight_bytes + self.adapter_bytes + self.head_copy_bytes + self.gradient_bytes
        return held + self.optimizer_bytes + self.other_bytes + self.step_bytes


def measure_step(
    config: RunConfig, hf_config: Mapping[str, Any], *, rank: int, world_size: int, rows: int
) -> StepMeasurement:
    """Run two steps and measure the second.

    Args:
        config: of the run; its model and data are not read.
        hf_config: the model's config.json.
        rank: which rank of the world this is.
        world_size: ranks.
        rows: full rows of `data.row_tokens` in a step of one data-parallel rank.

    Raises:
        RuntimeError: the process is not on a phantom GPU (`launch.environment("none")`).
    """
    with ExitStack() as stack:
        stack.enter_context(phantom(world=(rank, world_size)))
        stack.enter_context(running_layout(config.layout))
        gc.collect()  # models of earlier measurements are in reference cycles
        before_bytes = torch.cuda.memory_allocated()
        train_step = stack.enter_context(
            random_step(config, Architecture.from_hf(hf_config), is_alone=True)
        )
        batch = full_batch(config.data.row_tokens, rows, config.layout.data(world_size))
        train_step.train(batch, 1, lr=1e-4)
        torch.cuda.reset_peak_memory_stats()
        held_bytes = torch.cuda.memory_allocated()
        before, start_s = Counts.now(), time.process_time()
        train_step.train(batch, 2, lr=1e-4)
        cpu_s, counts = time.process_time() - start_s, Counts.now().since(before)
        step_bytes = torch.cuda.max_memory_allocated() - held_bytes
        state = state_bytes(train_step.policy)
        other_bytes = held_bytes - before_bytes - sum(state.values())
        return StepMeasurement(
            counts, cpu_s, **state, other_bytes=other_bytes, step_bytes=step_bytes
        )

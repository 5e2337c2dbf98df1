"""The learning rate of every step, as a function of the step.

The formulas are Transformers' (`get_cosine_schedule_with_warmup` and its siblings), so that a run
follows TRL's: the warm-up begins at 0, which the first step takes.
"""

import math
from dataclasses import dataclass

from megatron_idpo.config.training import OptimizerConfig
from megatron_idpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A schedule; a value, with no state of its own."""

    settings: OptimizerConfig
    total_steps: int
    """Steps of the whole run, whether it was resumed or not."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` where the warm-up does not end within the run."""
        if self.warmup_steps > self.total_steps:
            message = f"is {self.warmup_steps}, but the run has {self.total_steps} steps"
            remedy = f"use at most {self.total_steps}, or optimizer.warmup_fraction instead"
            raise ConfigError.at("optimizer.warmup_steps", message, remedy)

    @property
    def warmup_steps(self) -> int:
        """Steps before the highest learning rate."""
        if self.settings.warmup_fraction is not None:
            return math.ceil(self.settings.warmup_fraction * self.total_steps)
        return self.settings.warmup_steps

    def at(self, step: int) -> float:
        """The learning rate of the step after `step` completed ones, 0 <= step < total_steps."""
        settings, warmup = self.settings, self.warmup_steps
        if step < warmup:
            return settings.lr * step / warmup
        share = (step - warmup) / max(1, self.total_steps - warmup)
        left = {
            "constant": 1.0,
            "linear": 1.0 - share,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
        }[settings.schedule]
        return settings.min_lr + (settings.lr - settings.min_lr) * left

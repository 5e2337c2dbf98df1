"""Learning rate schedules.

The formulas are those of Transformers (`get_cosine_schedule_with_warmup` and others), so that runs
can be compared with TRL's: the warm-up starts at 0, the learning rate of the first step.
"""

import math
from dataclasses import dataclass

from megatron_idpo.config.training import OptimizerConfig
from megatron_idpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A schedule: a stateless function of the step."""

    settings: OptimizerConfig
    total_steps: int
    """Steps of the whole run, including those before it was resumed."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if the warm-up is longer than the run."""
        if self.warmup_steps > self.total_steps:
            message = f"is {self.warmup_steps}, but the run has {self.total_steps} steps"
            remedy = f"use at most {self.total_steps}, or optimizer.warmup_fraction instead"
            raise ConfigError.at("optimizer.warmup_steps", message, remedy)

    @property
    def warmup_steps(self) -> int:
        """Steps before the peak learning rate."""
        if self.settings.warmup_fraction is not None:
            return math.ceil(self.settings.warmup_fraction * self.total_steps)
        return self.settings.warmup_steps

    def at(self, step: int) -> float:
        """Learning rate of the step after `step` completed ones, 0 <= step < total_steps."""
        settings, warmup = self.settings, self.warmup_steps
        if step < warmup:
            return settings.lr * step / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        decay = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[settings.schedule]
        return settings.min_lr + (settings.lr - settings.min_lr) * decay

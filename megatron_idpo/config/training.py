"""The sections that say how a run goes: the optimizer, the run itself, checkpoints, logging."""

from typing import Literal

from megatron_idpo.config.sections import (
    Bool,
    Fraction,
    Int,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from megatron_idpo.errors import Problem


class OptimizerConfig(Section):
    """AdamW, and how its learning rate goes."""

    lr: PositiveFloat
    """The highest learning rate: about 1e-4 to 5e-4 for LoRA, 5e-7 to 5e-6 for all weights."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from `lr` to `min_lr` after the warm-up."""

    min_lr: NonNegativeFloat = 0.0
    """The learning rate at the end of the run."""

    warmup_steps: Int = 0
    """Steps over which the learning rate rises from 0 to `lr`."""

    warmup_fraction: Fraction | None = None
    """Instead of `warmup_steps`: the share of the run's steps."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, not applied to norms and biases."""

    beta1: Fraction = 0.9
    """Decay of the mean of gradients."""

    beta2: Fraction = 0.999
    """Decay of the mean of squared gradients."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""

    distributed: Bool = True
    """Split the optimizer's state over data-parallel ranks (ZeRO-1); with one rank it is whole."""

    def problems(self) -> list[Problem]:
        """Fields that exclude each other."""
        found = []
        if self.warmup_steps:
            found += self._unread(
                "warmup_fraction", "warmup_steps says how long it is", "keep one of them"
            )
        if self.schedule == "constant":
            found += self._unread("min_lr", "the schedule is constant", "leave it out")
        elif self.min_lr > self.lr:
            found.append(Problem("min_lr", f"is {self.min_lr}, above lr {self.lr}", "lower it"))
        return found


class TrainingConfig(Section):
    """The run."""

    output: PathText
    """Directory of everything the run leaves: checkpoints, metrics, the final model."""

    global_batch_pairs: PositiveInt = 32
    """Preference pairs in each optimizer step, over all processes."""

    epochs: PositiveInt = 1
    """How often the data is gone through."""

    max_steps: PositiveInt | None = None
    """End after this many optimizer steps, if the epochs do not end before."""

    eval_every_steps: PositiveInt | None = None
    """Evaluate held-out pairs every so many steps; null: only before and after training."""

    recompute: Literal["off", "selective", "full"] = "off"
    """Activations to compute again in the backward pass instead of keeping them: none, core
    attention's, or whole layers'."""

    recompute_layers: PositiveInt | None = None
    """With `recompute: full`: only the first so many layers of each chunk; null is all of them."""

    start_check: Bool = True
    """Before the first step, check that policy and reference agree at every layer (loss ln 2)."""

    export: Bool = True
    """At the end, write a Hugging Face model, and a PEFT adapter where LoRA was trained."""

    seed: Int = 0
    """Of dropout and of fresh adapters."""

    def problems(self) -> list[Problem]:
        """Fields that the others leave unread."""
        if self.recompute == "full":
            return []
        return self._unread(
            "recompute_layers", f"recompute is {self.recompute}", "set recompute to full"
        )


class CheckpointConfig(Section):
    """Saving the run's state, so that it can go on after anything."""

    every_steps: PositiveInt | None = 100
    """Save after every so many steps; null: only at the end and on a signal."""

    keep_last: PositiveInt = 2
    """How many of the newest checkpoints to keep."""

    keep_best: Int = 0
    """How many of those with the best `best_metric` to keep besides; only evaluated steps have one,
    so `training.eval_every_steps` must be `every_steps`, or divide it or be a multiple of it."""

    best_metric: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] = (
        "eval_loss"
    )
    """What `keep_best` goes by: the lowest loss, or the highest accuracy or margin."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in `training.output`, in whatever layout; `never`
    refuses an output directory that has one."""

    def problems(self) -> list[Problem]:
        """Fields that the others leave unread."""
        if self.keep_best:
            return []
        return self._unread("best_metric", "keep_best is 0", "set keep_best")


class WandbConfig(Section):
    """A run in Weights & Biases."""

    project: Text
    """The project's name."""

    name: Text | None = None
    """The run's name; null lets W&B choose one."""

    entity: Text | None = None
    """The team or user; null is the account's own."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the disk only."""


class LoggingConfig(Section):
    """What is told of the run, and where. `OUTPUT/metrics.jsonl` is always written."""

    every_steps: PositiveInt = 10
    """Log every so many steps, and the first and the last."""

    tensorboard: Bool = False
    """Also write TensorBoard events to `OUTPUT/tensorboard`."""

    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""

"""The sections `optimizer`, `training`, `checkpoint` and `logging`."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from megatron_idpo.config.section import (
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

DEFAULT_TIMEOUT_S = 1800
DEFAULT_HEARTBEAT_TIMEOUT_S = 40
"""Survivors end within a minute: one interval between heartbeats and the time to end are added."""

MIN_HEARTBEAT_TIMEOUT_S = 10


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat
    """The highest learning rate: about 1e-4 to 5e-4 for LoRA, 5e-7 to 5e-6 for all weights."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate decays from `lr` to `min_lr` after the warm-up."""

    min_lr: NonNegativeFloat = 0.0
    """The learning rate at the end of the run."""

    warmup_steps: Int = 0
    """Steps over which the learning rate rises from 0 to `lr`."""

    warmup_fraction: Fraction | None = None
    """Replaces `warmup_steps`: warm-up as a share of the run's steps."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, not applied to norms and biases."""

    beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""

    beta2: Fraction = 0.999
    """Decay of the running mean of squared gradients."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""

    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm at this value; 0 does not clip."""

    distributed: Bool = True
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""

    used_with: ClassVar = {"min_lr": ("schedule", "cosine", "linear")}
    exclusive: ClassVar = ("warmup_steps", "warmup_fraction")

    def problems(self) -> Iterator[Problem]:
        """A schedule that would rise."""
        if self.min_lr > self.lr and self.schedule != "constant":
            yield Problem("min_lr", f"is {self.min_lr}, above lr {self.lr}", "lower it")


class TrainingConfig(Section):
    """Length, batch size, evaluation and memory of a run."""

    output: PathText
    """Directory of the run: checkpoints, metrics, the final model."""

    global_batch_pairs: PositiveInt = 32
    """Preference pairs per optimizer step, over all processes."""

    epochs: PositiveInt = 1
    """Passes over the data."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, if the epochs do not end first."""

    eval_every_steps: PositiveInt | None = None
    """Steps between evaluations of the held-out pairs; null: only before and after training."""

    recompute: Literal["off", "selective", "full", "auto"] = "off"
    """Activations to recompute in the backward pass: none, those of core attention (which
    saves nothing: fused attention stores no scores), or those of whole layers. `auto` recomputes
    the fewest layers that fit into `memory_gb` by the figures of `plan`."""

    recompute_layers: PositiveInt | None = None
    """With `recompute: full`: only the first N layers of each chunk; null is all layers."""

    offload_activations: Bool = False
    """With `recompute: full`: keep the inputs of the layers in the host's memory until the backward
    pass (docs/long_context.md)."""

    memory_gb: PositiveFloat | None = None
    """With `recompute: auto`: what a process may use, in GB (10⁹ bytes). Null is the memory of the
    GPU; on a CPU it is required."""

    start_check: Bool = True
    """Before the first step, check that policy equals reference at every layer (loss ln 2)."""

    export: Bool = True
    """At the end, write a Hugging Face model, and with LoRA also a PEFT adapter."""

    seed: Int = 0
    """Seed of dropout and of the initial values of adapters."""

    timeout_s: PositiveInt = DEFAULT_TIMEOUT_S
    """How long a process may wait for another one in a collective, in seconds, during background
    saves too. Longer than the slowest thing that one process does while others wait: reading the
    model, compiling, exporting."""

    heartbeat_timeout_s: Int = DEFAULT_HEARTBEAT_TIMEOUT_S
    """A process or machine that sends no heartbeat for so many seconds is lost: the others name it
    and end. At least 10; 0 sends no heartbeats (for a debugger that stops all threads)."""

    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to trace with torch's profiler, as `[10, 12]`: a file for Perfetto per
    process of the first data-parallel replica, in `OUTPUT/profile`."""

    memory_snapshot: Bool = False
    """Record the GPU allocator's last 100,000 events and write them to `OUTPUT/memory` when the run
    ends, also when memory runs out: a file per process for https://pytorch.org/memory_viz."""

    deterministic: Bool = False
    """Use only GPU kernels that compute the same bits every time, at some cost of speed; a kernel
    that cannot is an error. On a CPU all are deterministic anyway."""

    used_with: ClassVar = {
        "recompute_layers": ("recompute", "full"),
        "offload_activations": ("recompute", "full"),
        "memory_gb": ("recompute", "auto"),
    }

    def problems(self) -> Iterator[Problem]:
        """A silence that a busy process reaches without being lost; steps in reverse."""
        if 0 < self.heartbeat_timeout_s < MIN_HEARTBEAT_TIMEOUT_S:
            message = f"is {self.heartbeat_timeout_s}: a busy process may be silent for longer"
            remedy = f"use {MIN_HEARTBEAT_TIMEOUT_S} or more, or 0 for no heartbeats"
            yield Problem("heartbeat_timeout_s", message, remedy)
        if self.profile is not None and self.profile[0] > self.profile[1]:
            message = f"is {list(self.profile)}: it ends before it begins"
            yield Problem("profile", message, "give the first step, then the last one")


class CheckpointConfig(Section):
    """Saving the state of the run, to resume it after any interruption."""

    every_steps: PositiveInt | None = 100
    """Steps between checkpoints; null: only at the end and on a signal."""

    keep_last: PositiveInt = 2
    """How many of the newest checkpoints to keep."""

    keep_best: Int = 0
    """How many checkpoints with the best `best_metric` to keep as well. Only evaluated steps have
    one, so `training.eval_every_steps` must divide `every_steps` or be a multiple of it."""

    best_metric: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] = (
        "eval_loss"
    )
    """The metric of `keep_best`: lowest loss, or highest accuracy or margin."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest checkpoint in `training.output`, in any layout; `never` is an
    error if there is one."""

    used_with: ClassVar = {"best_metric": ("keep_best",)}


class WandbConfig(Section):
    """A run in Weights & Biases."""

    project: Text
    """The project's name."""

    name: Text | None = None
    """The run's name; null lets W&B choose one."""

    entity: Text | None = None
    """The team or user; null is the default of the account."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes to disk only."""


class LoggingConfig(Section):
    """Where metrics go. `OUTPUT/metrics.jsonl` is always written."""

    every_steps: PositiveInt = 10
    """Log every N steps, and the first and the last step."""

    tensorboard: Bool = False
    """Also write TensorBoard events to `OUTPUT/tensorboard`."""

    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""

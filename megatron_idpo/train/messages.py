"""What a run says at its beginning and at its end: where it stands, where things are, what to do.

Every path that is named exists when it is named.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.figures.training_curves import draw_curves
from megatron_idpo.lora.settings import resolve_targets
from megatron_idpo.reference.run_caches import cache_directory
from megatron_idpo.train.logging.report import Report
from megatron_idpo.train.trainer import Run


def tell_start(run: Run, report: Report, resumed: Path | None) -> None:
    """A few lines about what is going to happen."""
    say, config, policy = report.console.say, run.config, run.trainer.policy
    learnt = "all weights"
    if config.lora is not None:
        targets = resolve_targets(config.lora.targets)
        learnt = f"LoRA rank {config.lora.rank} on {', '.join(targets)}"
    layers = ", ".join(map(str, policy.dpo.layers)) or "none: plain DPO"
    held_out = 0 if run.pairs.eval is None else len(run.pairs.eval)
    say(
        f"{len(run.pairs.train):,} pairs to train on, {held_out:,} held out; {run.total_steps:,} "
        f"steps of {config.training.global_batch_pairs} pairs{_left_over(run)}"
    )
    for warning in run.pairs.train_report.warnings():
        say(f"data: {warning}")
    say(f"training {learnt}; intermediate layers: {layers} of {policy.dpo.num_layers}")
    if config.reference.source == "cache":
        say(f"reference log-probabilities: {cache_directory(config)}")
    if config.reference.source != "none" and not run.starts_at_reference:
        say(f"reference: {_reference_in_words(run)}; no start check")
    if resumed is not None:
        say(f"going on after step {run.step} from {resumed}")
    if run.is_complete:
        say(f"all {run.total_steps} steps have been taken")


def _left_over(run: Run) -> str:
    """Pairs that fill no batch, unless the run ends before it would meet them."""
    left = run.batches.dropped_pairs
    max_steps = run.config.training.max_steps
    ends_before = max_steps is not None and run.step + run.batches.remaining_batches > max_steps
    return "" if ends_before or not left else f", {left:,} pairs left over"


def _reference_in_words(run: Run) -> str:
    """What a policy is compared to that does not start as its reference."""
    has_adapter = run.config.lora is not None and run.config.lora.adapter is not None
    return "the model without lora.adapter" if has_adapter else "the step before"


def tell_preempted(run: Run, report: Report) -> None:
    """That everything is saved, and how to go on."""
    report.console.say(
        f"stopped by a signal after step {run.step}, saved in {run.output.checkpoints}; the same "
        f"command goes on from there (exit code {EXIT_PREEMPTED})"
    )


def tell_stopped(*, show: bool) -> None:
    """That a signal came while nothing was trained, and how to go on."""
    if show:
        print(
            "stopped by a signal; everything so far is saved, and the same command goes on from "
            f"there (exit code {EXIT_PREEMPTED})",
            flush=True,
        )


def tell_finished(run: Run, report: Report, left: Sequence[str]) -> None:
    """The summary, the picture, and what was left where; on the first rank."""
    if not run.world.is_first:
        return
    output, say = run.output, report.console.say
    draw_curves(output.metrics, output.curves)
    report.summary(output.metrics)
    say(f"curves   {output.curves}")
    say(f"metrics  {output.metrics}")
    for line in left:
        say(line)

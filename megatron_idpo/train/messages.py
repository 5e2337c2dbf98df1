"""Lines at the start and at the end of a run: its size, its settings, where the results are.

Every path that is printed exists at that time.
"""

from collections.abc import Sequence

from megatron_idpo.console.text import format_count, format_duration
from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.reference.run_caches import cache_directory
from megatron_idpo.train.logging.report import Report
from megatron_idpo.train.metrics.intervals import wilson_interval
from megatron_idpo.train.trainer import Trainer

_FEW_HELD_OUT = 20
"""Below, the interval of an accuracy covers 0.3 to 0.7, and no layer or setting can be chosen."""


def report_start(trainer: Trainer, report: Report) -> None:
    """Print what the run is going to do."""
    config, dpo, pairs = trainer.config, trainer.policy.dpo, trainer.pairs
    show = report.print
    held_out = 0 if pairs.eval is None else len(pairs.eval)
    show(
        f"{len(pairs.train):,} pairs to train on, {held_out:,} held out; "
        f"{format_count(trainer.total_steps, 'step')} of "
        f"{format_count(config.training.global_batch_pairs, 'pair')}{_dropped_pairs(trainer)}"
    )
    if 0 < held_out < _FEW_HELD_OUT:
        low, high = wilson_interval(0.5, held_out)
        show(
            f"only {format_count(held_out, 'held-out pair')}: an accuracy of 0.5 has the 95 % "
            f"interval [{low:.2f}, {high:.2f}]; hold out more in data.eval or data.eval_fraction"
        )
    for warning in pairs.train_report.warnings():
        show(f"data: {warning}")
    trained = "all weights"
    if config.lora is not None:
        architecture = trainer.policy.source.architecture
        targets = ", ".join(config.lora.for_model(architecture).names)
        trained = f"LoRA rank {config.lora.rank} on {targets}"
    objective = f"plain DPO ({dpo.num_layers} layers, no taps)"
    if dpo.layers:
        objective = f"intermediate layers: {', '.join(map(str, dpo.layers))} of {dpo.num_layers}"
    show(f"training {trained}; {objective}")
    if trainer.recompute_message is not None:
        show(trainer.recompute_message)
    if config.reference.source == "cache":
        show(f"reference log-probs: {cache_directory(config)}")
    if config.reference.source != "none" and not trainer.starts_at_reference:
        has_adapter = config.lora is not None and config.lora.adapter is not None
        reference = "the model without lora.adapter" if has_adapter else "the previous sDPO step"
        show(f"reference: {reference}; no start check")
    if trainer.resumed_from is not None:
        show(f"resuming from step {trainer.step}: {trainer.resumed_from}")
    if trainer.is_complete:
        show(f"all {trainer.total_steps} steps are complete")
    if trainer.ignored_settings:
        changed = "; ".join(trainer.ignored_settings)
        show(
            f"no effect on a complete run: {changed}. To train again, name another training.output"
        )


def report_compiled(compiled: tuple[Sequence[int], float] | None, report: Report) -> None:
    """Print what `compile_ahead` has done, if anything."""
    if compiled is not None:
        lengths, seconds = compiled
        shown = ", ".join(map(str, lengths))
        report.print(f"compiled for rows of {shown} tokens in {format_duration(seconds)}")


def _dropped_pairs(trainer: Trainer) -> str:
    """Pairs that do not fill a batch, unless the run ends before it reaches them."""
    dropped, max_steps = trainer.batches.dropped_pairs, trainer.config.training.max_steps
    steps = trainer.step + trainer.batches.remaining_batches
    ends_before = max_steps is not None and steps > max_steps
    return "" if ends_before or not dropped else f", {dropped:,} pairs dropped (incomplete batch)"


def report_preempted(trainer: Trainer, report: Report) -> None:
    """Print that the run is saved, and how to resume it."""
    report.print(
        f"stopped by a signal after step {trainer.step}; saved in {trainer.output.checkpoints}; "
        f"the same command resumes from there (exit code {EXIT_PREEMPTED})"
    )


def report_finished(trainer: Trainer, report: Report, results: Sequence[str]) -> None:
    """Draw the curves and print the summary and where the results are, on the first rank."""
    if not trainer.world.is_first:
        return
    # Only rank 0 draws: importing matplotlib takes most of a second on a core.
    from megatron_idpo.train.metrics.curves import draw_curves

    output = trainer.output
    draw_curves(output.metrics, output.curves, title=output.name)
    report.summary(output.metrics)
    for line in (f"curves   {output.curves}", f"metrics  {output.metrics}", *results):
        report.print(line)

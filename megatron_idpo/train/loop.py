"""Training from beginning to end: set up, check, take steps, evaluate, save, export.

Every function here is collective: all ranks run it in the same order.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import EXIT_PREEMPTED, TrainingError
from megatron_idpo.mcore.parallel.world import (
    RunStopped,
    StopFlag,
    World,
    catch_stop_signals,
    distributed_world,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.mcore.watchdog.activity import doing
from megatron_idpo.train.callbacks import Callback
from megatron_idpo.train.compile_ahead import compile_ahead
from megatron_idpo.train.elastic import waits_for_other_machines
from megatron_idpo.train.export import export_result
from megatron_idpo.train.finite_checks import check_evaluation_finite
from megatron_idpo.train.hub import check_can_push
from megatron_idpo.train.logging.report import Report, open_report
from megatron_idpo.train.messages import (
    report_compiled,
    report_finished,
    report_preempted,
    report_start,
)
from megatron_idpo.train.recording import record
from megatron_idpo.train.run_directory import RunDirectory, check_not_stepped, open_run_directory
from megatron_idpo.train.setup import Prepared, assemble, prepare
from megatron_idpo.train.start_check import check_start, is_start_check_due
from megatron_idpo.train.starts import this_start, write_start
from megatron_idpo.train.trainer import Trainer

logger = logging.getLogger(__name__)

Finalize = Callable[[Trainer, Report], Sequence[str]]
"""Called with the trained model in memory; returns lines that say where the results are.

Collective. Must be idempotent, because a run that has ended may be started again."""


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> int:
    """Train as configured, from the start or from the newest checkpoint.

    Args:
        config: of the run.
        callbacks: receive the events of the run.

    Returns:
        0 if the run is complete; `EXIT_PREEMPTED` if a signal stopped it, after saving.

    Raises:
        UserError: on every rank; checkpoints that were complete before still exist.
    """
    with (
        catch_stop_signals() as stop_flag,
        distributed_world(config) as world,
        open_run_directory(Path(config.training.output)) as output,
    ):
        if waits_for_other_machines(config, world):
            return EXIT_PREEMPTED
        with raise_on_all_ranks("checking the output directory"):
            check_not_stepped(output.root)
        check_can_push(config, output)
        prepared = prepare(config, world)
        return train_prepared(
            *(config, world, output, prepared, stop_flag), finalize=export, callbacks=callbacks
        )


def train_prepared(
    config: RunConfig,
    world: World,
    output: RunDirectory,
    prepared: Prepared,
    stop_flag: StopFlag,
    *,
    finalize: Finalize,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Train on prepared data from a prepared start; a step of sDPO is such a run.

    Args:
        config: of the run.
        world: all processes.
        output: the run's directory, locked by this run.
        prepared: data, start and reference.
        stop_flag: whether this process has received a stop signal.
        finalize: called after the last step.
        callbacks: receive the events of the run.

    Returns:
        As `train`.

    Raises:
        UserError: as `train`.
    """
    with (
        running_layout(config.layout, config.training.seed),
        record(config.training, output.root) as recorders,
    ):
        try:
            with doing("building the model and its reference"):
                trainer = assemble(config, world, output, prepared, stop_flag)
        except RunStopped:
            return preempted_before_training(show=world.is_first)
        trainer.write_config()
        _record_start(trainer)
        with (
            doing("training"),
            trainer.checkpoints,
            open_report(trainer, (*recorders, *callbacks)) as report,
        ):
            report_start(trainer, report)
            report.start(trainer.output.root)
            if not trainer.is_complete:
                with doing("compiling"):
                    compiled = compile_ahead(trainer.policy, trainer.rows)
                report_compiled(compiled, report)
            is_stopped = False
            if trainer.resumed_from is None:
                run_start_check(trainer, report)
            if trainer.resumed_from is None or trainer.lacks_evaluation:
                is_stopped = not evaluate(trainer, report)
            is_complete = not is_stopped and (trainer.is_complete or train_steps(trainer, report))
            report.end(trainer.step, is_complete=is_complete)
            if not is_complete and trainer.step == 0:
                return preempted_before_training(show=world.is_first)
            if not is_complete:
                report_preempted(trainer, report)
                return EXIT_PREEMPTED
            with doing("exporting", step=trainer.step):
                trainer.policy.trainable.gather_weights()
                results = finalize(trainer, report)
        report_finished(trainer, report, results)
    return 0


def _record_start(trainer: Trainer) -> None:
    """Append to the run's record of starts, unless all steps are complete. Collective."""
    with raise_on_all_ranks("recording the start"):
        if trainer.world.is_first and not trainer.is_complete:
            held_out = trainer.pairs.eval
            start = this_start(
                step=trainer.step,
                total_steps=trainer.total_steps,
                processes=trainer.world.size,
                held_out=None if held_out is None else held_out.fingerprint,
            )
            write_start(trainer.output.root, start)


def preempted_before_training(*, show: bool) -> int:
    """Report a stop signal that came while nothing was trained; returns `EXIT_PREEMPTED`."""
    if show:
        logger.info(
            "stopped by a signal; all results so far are saved, and the same command resumes "
            "(exit code %d)",
            EXIT_PREEMPTED,
        )
    return EXIT_PREEMPTED


def run_start_check(trainer: Trainer, report: Report) -> None:
    """Check that policy and reference agree before the first step, if they should."""
    if not is_start_check_due(trainer.config, starts_at_reference=trainer.starts_at_reference):
        return
    difference, bound = check_start(
        trainer.train_step,
        trainer.pairs.train,
        trainer.rows,
        seed=trainer.config.data.seed,
        global_batch_pairs=trainer.config.training.global_batch_pairs,
    )
    report.print(
        f"start check passed: policy equals reference within {trainer.config.model.dtype} "
        f"rounding (max {difference:.1g} nats/token, bound {bound:g})"
    )


def train_steps(trainer: Trainer, report: Report) -> bool:
    """Step, report, evaluate and save until the last step or a stop signal.

    A stop does not wait for an evaluation, which may take longer than the scheduler does. The one
    after the last step then follows the save; another one is made by the next start.

    Args:
        trainer: of a run that is not complete.
        report: of the run.

    Returns:
        Whether the last step has been taken.
    """
    report.meter.begin()
    for batch in trainer.batches:
        lr = trainer.learning_rate.at(trainer.step)
        try:
            with doing("training step", step=trainer.step + 1, is_timed=True):
                metrics, grad_norm = trainer.train_step.train(batch, trainer.step + 1, lr=lr)
        except TrainingError as error:
            raise trainer.with_last_checkpoint(error) from error
        trainer.step += 1
        trainer.eval_values = {}
        is_stopping = metrics.stop_requested
        report.step(
            trainer.step,
            metrics,
            grad_norm=grad_norm,
            lr=lr,
            epoch=trainer.batches.epoch,
            is_last=is_stopping or trainer.is_complete,
        )
        # Publishes a background save that has finished on all ranks; does not wait for one.
        report.checkpoint(trainer.checkpoints.poll())
        if trainer.is_evaluation_due:
            is_stopping = is_stopping or not evaluate(trainer, report)
        is_last = is_stopping or trainer.is_complete
        if trainer.is_due(trainer.config.checkpoint.every_steps) or is_last:
            with doing("saving", step=trainer.step):
                report.checkpoint(trainer.save())
        if is_last:
            break
        report.meter.begin()
    with doing("waiting for the last save", step=trainer.step):
        report.checkpoint(trainer.checkpoints.wait())
    assert is_last, "the data ended before the last step"
    if trainer.is_complete and is_stopping:
        evaluate(trainer, report, until_stop=False)
    return trainer.is_complete


def evaluate(trainer: Trainer, report: Report, *, until_stop: bool = True) -> bool:
    """Evaluate the held-out pairs, if there are any, and report the metrics.

    Args:
        trainer: of the run.
        report: of the run.
        until_stop: whether a stop signal ends it.

    Returns:
        Whether no stop signal has ended it.
    """
    if trainer.evaluation is None:
        return True
    start_s = time.perf_counter()
    with (
        report.evaluating(len(trainer.evaluation)) as advance,
        doing("evaluation", step=trainer.step, is_timed=True),
    ):
        run = trainer.evaluation.run_until_stop if until_stop else trainer.evaluation.run
        metrics = run(advance)
    if metrics is None:
        return False
    try:
        check_evaluation_finite(metrics, trainer.step)
    except TrainingError as error:
        raise trainer.with_last_checkpoint(error) from error
    seconds = time.perf_counter() - start_s
    trainer.eval_values = report.evaluation(trainer.step, metrics, seconds=seconds)
    return True


def export(trainer: Trainer, report: Report) -> Sequence[str]:
    """Export the trained model, unless `training.export` is off."""
    if not trainer.config.training.export:
        return [f"state    {trainer.output.checkpoints}"]
    return export_result(
        trainer.config,
        trainer.policy,
        trainer.output,
        metrics=trainer.held_out_metrics(),
        show_progress=trainer.world.is_first,
    )

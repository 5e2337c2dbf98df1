"""The main job: train, resume, export. `train` is the whole of it, as named steps.

Everything here happens on every rank, in the same order. `train_prepared` is the same for a run
whose data, starting point or end are somebody else's choice, as those of sDPO's steps are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import EXIT_PREEMPTED, TrainingError
from megatron_idpo.mcore.parallel.signals import StopFlag, Stopped, listening
from megatron_idpo.mcore.parallel.world import World, joined_world, raise_on_all_ranks, running
from megatron_idpo.train.export import export_result
from megatron_idpo.train.finite_checks import refuse_bad_evaluation
from megatron_idpo.train.logging.report import MEMORY, Report, Stopwatch, reporting
from megatron_idpo.train.messages import tell_finished, tell_preempted, tell_start, tell_stopped
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.throughput import peak_memory_bytes
from megatron_idpo.train.run_directory import RunDirectory, opened, refuse_steps_directory
from megatron_idpo.train.start_check import check_start, is_expected
from megatron_idpo.train.trainer import Prepared, Run, assemble, prepare

_STOP = "stop_wishes"


def train(config: RunConfig) -> int:
    """Train as configured, from the start or from where an earlier run ended.

    Returns:
        0 when the run is complete, `EXIT_PREEMPTED` when a signal ended it early, saved.

    Raises:
        UserError: on every rank; what was saved before is there.
    """
    with (
        listening() as stop_flag,
        joined_world() as world,
        opened(Path(config.training.output)) as output,
    ):
        with raise_on_all_ranks("looking at the output directory"):
            refuse_steps_directory(output.root)
        prepared = prepare(config, world)
        return train_prepared(config, world, output, prepared, stop_flag, conclude=export)


def train_prepared(
    config: RunConfig,
    world: World,
    output: RunDirectory,
    prepared: Prepared,
    stop_flag: StopFlag,
    *,
    conclude: Callable[[Run, Report], Sequence[str]],
) -> int:
    """Train as configured, on prepared data from a prepared starting point.

    Args:
        config: of the run.
        world: all processes.
        output: the run's directory, which it holds.
        prepared: data, starting point and reference.
        stop_flag: whether this process has been asked to stop.
        conclude: called at the end with the trained model in memory; returns lines that say what
            it has left where. Collective; it has to bear being called again, where a run is started
            again that had ended.

    Returns:
        As `train`.

    Raises:
        UserError: on every rank; what was saved before is there.
    """
    with running(config.layout.layout(), config.training.seed):
        try:
            run = assemble(config, world, output, prepared, stop_flag)
        except Stopped:
            tell_stopped(show=world.is_first)
            return EXIT_PREEMPTED
        resumed = run.resume()
        run.write_config()
        with run.checkpoints, reporting(run) as report:
            tell_start(run, report, resumed)
            if not resumed:
                begin(run, report)
            if take_steps(run, report, stop_flag) == EXIT_PREEMPTED:
                tell_preempted(run, report)
                return EXIT_PREEMPTED
            left = conclude(run, report)
        tell_finished(run, report, left)
    return 0


def export(run: Run, report: Report) -> Sequence[str]:
    """Write the result, if it is wanted; says where it is, or the state where it is not."""
    if not run.config.training.export:
        return [f"state    {run.output.checkpoints}"]
    return export_result(
        run.config, run.trainer.policy, run.output, show_progress=run.world.is_first
    )


def begin(run: Run, report: Report) -> None:
    """What comes before the first step: the check that it starts right, the first evaluation."""
    if is_expected(run.config, starts_at_reference=run.starts_at_reference):
        losses = check_start(run.trainer, run.pairs.train, run.rows, seed=run.config.data.seed)
        message = ", ".join(f"layer {layer} {loss:.6f}" for layer, loss in losses.items())
        report.console.say(f"start check passed, policy and reference are equal: {message}")
    evaluate(run, report)


def take_steps(run: Run, report: Report, stop_flag: StopFlag) -> int:
    """The loop: step, report, evaluate, save, until the end or a signal. Returns the exit code."""
    if run.is_complete:
        return 0
    report.meter.begin()
    for batch in run.batches:
        lr = run.learning_rate.at(run.step)
        work = BatchWork.of(batch.rows, run.trainer.policy.source.architecture.windows)
        try:
            metrics, grad_norm = run.trainer.step(
                batch,
                run.step + 1,
                lr=lr,
                extra=partial(_step_numbers, stop_flag, work),
                peaks=lambda: {MEMORY: float(peak_memory_bytes())},
            )
        except TrainingError as error:
            raise run.with_last_good(error) from error
        run.step += 1
        run.evaluated = {}
        is_stopping = metrics.extra[_STOP] > 0
        report.step(
            run.step,
            metrics,
            grad_norm=grad_norm,
            lr=lr,
            epoch=run.batches.epoch,
            ends=is_stopping or run.is_complete,
        )
        run.checkpoints.poll()
        if run.is_due(run.config.training.eval_every_steps) or run.is_complete:
            evaluate(run, report)
        if run.is_due(run.config.checkpoint.every_steps) or run.is_complete or is_stopping:
            run.save()
        if run.is_complete or is_stopping:
            break
        report.meter.begin()
    run.checkpoints.wait()
    assert run.is_complete or is_stopping, "the data reach as far as the run does"
    return 0 if run.is_complete else EXIT_PREEMPTED


def _step_numbers(stop_flag: StopFlag, work: BatchWork) -> dict[str, float]:
    """What is summed over ranks along with a step's metrics."""
    return {_STOP: float(stop_flag.is_there), **work.as_extra()}


def evaluate(run: Run, report: Report) -> None:
    """Read the held-out pairs, if there are any, and tell what the policy makes of them."""
    if run.evaluation is None:
        return
    watch = Stopwatch()
    with report.console.counting("evaluating", len(run.evaluation)) as advance:
        metrics = run.evaluation.run(advance)
    try:
        refuse_bad_evaluation(metrics, run.step)
    except TrainingError as error:
        raise run.with_last_good(error) from error
    run.evaluated = report.evaluation(run.step, metrics, seconds=watch.read())

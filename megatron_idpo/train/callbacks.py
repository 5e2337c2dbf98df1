"""What an embedding script can do during a run: `megatron_idpo.train(config, callbacks=[...])`.

The metrics file, TensorBoard and W&B (`logging/loggers.py`) and the profiler (`profile.py`) are
callbacks too.
"""

from collections.abc import Mapping
from pathlib import Path


class Callback:
    """Receives the events of a run. Override the methods that are needed.

    Callbacks are called on every rank, in the same order and with the same values, so a method may
    use collectives if it does so on every rank. A method that prints or writes a file should do it
    on the first rank. An exception ends the run; a `UserError` on any rank is raised on all, and
    reported by one without a traceback. Only `on_step`, which is called too often for the
    collective that this takes, should raise on every rank or on none. Stepwise DPO calls `on_start`
    and `on_end` for each of its steps.
    """

    def on_start(self, output: Path, *, step: int, total_steps: int) -> None:
        """Before the first step of this start.

        Args:
            output: the run's directory.
            step: optimizer steps taken before; more than 0 if the run resumes.
            total_steps: of the whole run.
        """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """After each optimizer step.

        Args:
            step: from 1.
            values: losses, margins and accuracies of the step's pairs (`metrics/names.py`).
        """

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """A record for the loggers: every `logging.every_steps` steps, and each evaluation.

        Args:
            step: from 1; 0 is the evaluation before training.
            values: means since the previous record, with learning rate, throughput and memory; or
                the values of an evaluation, which begin with `eval_`.
        """

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """After an evaluation of the held-out pairs; values begin with `eval_`."""

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """A checkpoint is complete on disk. `step` is the one it was saved at."""

    def on_end(self, step: int, *, is_complete: bool) -> None:
        """After the last step of this start; not called if an error ends the run.

        The result is exported afterwards: its files are there when `train` returns.

        Args:
            step: optimizer steps taken.
            is_complete: False if a signal stopped the run.
        """

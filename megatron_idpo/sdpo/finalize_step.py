"""The end of a step, with its trained model in memory: figures, exports, snapshot, manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.peft_config import CONFIG_NAME
from megatron_idpo.mcore.parallel.world import is_first_rank, raise_on_all_ranks
from megatron_idpo.reference.live import Reference
from megatron_idpo.sdpo.manifest import FIRST
from megatron_idpo.sdpo.manifest_file import ManifestFile
from megatron_idpo.sdpo.retention import snapshot_directory
from megatron_idpo.sdpo.snapshot import write_snapshot
from megatron_idpo.storage import directories as atomic
from megatron_idpo.train.evaluation import Evaluation
from megatron_idpo.train.export import export_result
from megatron_idpo.train.logging.report import Report
from megatron_idpo.train.metrics.names import EVAL
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.trainer import Run


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What is done at the end of a step, before its model goes."""

    manifest: ManifestFile
    number: int
    first_eval: Reference | None
    """What the first model says of the held-out pairs; None where there are none."""

    carries_adapter: bool
    is_on_first_model: bool
    """Whether the policy's weights below the adapters are the first model's."""

    result: Path | None
    """Where the model is exported to as the whole run's; None where it is not, or not wanted."""

    def __call__(self, run: Run, report: Report) -> Sequence[str]:
        """All of it. Collective; twice does the same.

        The snapshot comes last but one, since it takes the policy's weights, and the manifest after
        it: until then the step is not complete.
        """
        metrics = {**self._against_reference(run), **self._against_first(run)}
        lines = self._exported(run)
        directory = snapshot_directory(self.manifest.root, self.number)
        snapshot = write_snapshot(
            run.config, run.trainer.policy, directory, carry=self.carries_adapter
        )
        self.manifest.completed(self.number, snapshot, metrics)
        return [f"snapshot {directory}", *lines]

    def _against_reference(self, run: Run) -> dict[str, float]:
        """The last evaluation's figures; read anew where an earlier start made them."""
        if run.evaluation is None:
            return {}
        return dict(run.evaluated) or run.evaluation.run(_nothing).evaluation_values()

    def _against_first(self, run: Run) -> dict[str, float]:
        """The same of the first model as the reference, on held-out pairs."""
        if self.first_eval is None or run.pairs.eval is None:
            return {}
        against_first = Evaluation(
            run.trainer,
            self.first_eval,
            run.pairs.eval,
            run.rows,
            global_batch_pairs=run.config.training.global_batch_pairs,
        )
        values = against_first.run(_nothing).evaluation_values()
        return {f"{FIRST}{name}": value for name, value in values.items() if name.startswith(EVAL)}

    def _exported(self, run: Run) -> list[str]:
        """The step's own model and the run's, where they are wanted."""
        locations = [run.output] if run.config.training.export else []
        if self.result is not None:
            locations.append(RunDirectory(self.result))
        policy, lines = run.trainer.policy, []
        for output in locations:
            lines += export_result(
                run.config,
                policy,
                output,
                with_adapter=self.is_on_first_model,
                show_progress=run.world.is_first,
            )
            if not self.is_on_first_model:
                with raise_on_all_ranks("removing an earlier adapter"):
                    _remove_adapter(output)
        return lines


def _remove_adapter(output: RunDirectory) -> None:
    """Take away an adapter that an earlier end left beside another model. On the first rank.

    It loses its name first, so that none is there by half.

    Raises:
        CheckpointError: it cannot be removed.
    """
    if not (is_first_rank() and (output.adapter / CONFIG_NAME).is_file()):
        return
    doomed = atomic.incomplete_directory(output.adapter, uuid4().hex[:8])
    try:
        output.adapter.rename(doomed)
    except OSError as error:
        message = f"is of an earlier step, and cannot be removed: {error.strerror}"
        raise CheckpointError.at(str(output.adapter), message, "delete it") from None
    atomic.discard(doomed)


def _nothing() -> None:
    """An evaluation without a progress bar."""

"""The end of an sDPO step, with the trained model in memory: metrics, exports, snapshot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapter_config import CONFIG_NAME
from megatron_idpo.mcore.parallel.world import is_rank0, raise_on_all_ranks
from megatron_idpo.reference.sources import Reference
from megatron_idpo.sdpo.manifest import FIRST, snapshot_directory
from megatron_idpo.sdpo.manifest_file import ManifestFile
from megatron_idpo.sdpo.report import write_metrics
from megatron_idpo.sdpo.snapshot import write_snapshot
from megatron_idpo.storage.atomic import delete_directory
from megatron_idpo.train.export import export_result
from megatron_idpo.train.logging.report import Report
from megatron_idpo.train.metrics.names import EVAL
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class StepFinalizer:
    """Finalizes one step; passed to `train_prepared`."""

    config: RunConfig
    """Of the whole run."""

    manifest: ManifestFile
    number: int
    first_eval: Reference | None
    """The first model on the held-out pairs; None if there are none."""

    carries_adapter: bool
    is_on_first_model: bool
    """Whether the weights below the policy's adapters are the first model's."""

    result: Path | None
    """Where to export the model as the result of the whole run; None exports nothing."""

    def __call__(self, trainer: Trainer, report: Report) -> Sequence[str]:
        """Finalize the step. Collective and idempotent.

        The order matters: the snapshot consumes the policy's weights, so it follows the exports.
        The manifest is written last: only then is the step complete.
        """
        against_first = self._metrics_against_first(trainer)
        metrics = dict(trainer.held_out_metrics())
        metrics |= {f"{FIRST}{name}": value for name, value in against_first.items()}
        lines = self._export(trainer, against_first)
        directory = snapshot_directory(self.manifest.root, self.number)
        snapshot = write_snapshot(
            trainer.config, trainer.policy, directory, carry=self.carries_adapter
        )
        self.manifest.mark_complete(self.number, snapshot, metrics)
        return [f"snapshot {directory}", *lines]

    def _metrics_against_first(self, trainer: Trainer) -> dict[str, float]:
        """Held-out metrics against the first model."""
        if self.first_eval is None or trainer.evaluation is None:
            return {}
        values = trainer.evaluation.run(reference=self.first_eval).evaluation_values()
        return {name: value for name, value in values.items() if name.startswith(EVAL)}

    def _export(self, trainer: Trainer, metrics: Mapping[str, float]) -> list[str]:
        """Export the step's model and the run's, as configured.

        Args:
            trainer: of the step.
            metrics: against the first model: only these compare with those of other runs.
        """
        outputs: list[tuple[RunDirectory, int | None]] = []
        if trainer.config.training.export:
            outputs.append((trainer.output, self.number))
        if self.result is not None:
            output = RunDirectory(self.result)
            with raise_on_all_ranks("collecting the metrics of all steps"):
                if is_rank0():  # for the card's picture
                    write_metrics(output, range(1, self.number + 1))
            outputs.append((output, None))
        lines = []
        for output, step in outputs:
            lines += export_result(
                self.config,
                trainer.policy,
                output,
                step=step,
                with_adapter=self.is_on_first_model,
                metrics=metrics,
                show_progress=trainer.world.is_first,
            )
            if not self.is_on_first_model:
                with raise_on_all_ranks("removing an earlier adapter"):
                    _remove_adapter(output)
        return lines


def _remove_adapter(output: RunDirectory) -> None:
    """Remove an adapter that an earlier end left next to another model; on the first rank.

    Raises:
        CheckpointError: it cannot be removed.
    """
    if not (is_rank0() and (output.adapter / CONFIG_NAME).is_file()):
        return
    message = "belongs to an earlier step and cannot be removed"
    with CheckpointError.on_os_error(str(output.adapter), message, "delete it"):
        delete_directory(output.adapter)

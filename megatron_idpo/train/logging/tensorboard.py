"""TensorBoard events, as an optional extra."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from megatron_idpo.errors import Problem
from megatron_idpo.train.metrics.names import dashboard_name


class TensorBoardLogger:
    """A logger that writes event files, which TensorBoard shows while the run goes on."""

    def __init__(self, directory: Path, *, resumed_step: int | None) -> None:
        """Open an event file.

        Args:
            directory: of the event files, those of the run's earlier starts among them.
            resumed_step: the last step this run goes on from: TensorBoard forgets later ones. None
                is a new run: it forgets all.
        """
        from torch.utils.tensorboard import SummaryWriter

        purged = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purged)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar, and hand it to the system."""
        for name, value in values.items():
            self._writer.add_scalar(dashboard_name(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; a second call does nothing."""
        self._writer.close()


def tensorboard_problems() -> list[Problem]:
    """Why TensorBoard cannot be logged to here."""
    if importlib.util.find_spec("tensorboard") is not None:
        return []
    return [
        Problem(
            "logging.tensorboard",
            "needs the package tensorboard, which is not installed",
            'pip install "megatron-idpo[tensorboard]", or set it to false',
        )
    ]

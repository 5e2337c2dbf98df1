"""The output directory of a run, which one run at a time writes.

OUTPUT/
  config.yaml      the resolved configuration       checkpoints/   to resume from
  metrics.jsonl    one line per logged step          curves.png     plot of the metrics
  hf/              trained model for Transformers    adapter/       trained adapter for PEFT
  reference/       log-probabilities of the reference, computed before the first step
  starts.jsonl     time, machine, versions and command of each start
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_idpo.config.sdpo_steps import MANIFEST
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import is_rank0, raise_on_all_ranks
from megatron_idpo.storage.atomic import clear_leftovers, write_text
from megatron_idpo.storage.lock import locked_directory

_LOCATION = "training.output"


class RunDirectory:
    """Paths in the output directory; see above for their content."""

    def __init__(self, root: Path) -> None:
        """The directory need not exist."""
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.curves = root / "curves.png"
        self.checkpoints = root / "checkpoints"
        self.hf = root / "hf"
        self.adapter = root / "adapter"

    @property
    def name(self) -> str:
        """For titles: the directory's name; of a step of sDPO after the run's: `sdpo/step-1`."""
        root = self.root.resolve()
        is_step = root.name.startswith("step-") and (root.parent / MANIFEST).is_file()
        return f"{root.parent.name}/{root.name}" if is_step else root.name

    def write_config(self, text: str) -> None:
        """Write the resolved configuration atomically.

        Raises:
            ConfigError: it cannot be written; an earlier one is unchanged.
        """
        message = f"{self.config} cannot be written"
        with ConfigError.on_os_error(_LOCATION, message, "check that its directory exists"):
            write_text(self.config, text)


@contextmanager
def open_run_directory(root: Path) -> Iterator[RunDirectory]:
    """Create a run's directory and lock it until the end of the block. Collective.

    Incomplete exports of killed runs are deleted. The lock is a file lock of the operating
    system: it is released when the process exits, even if killed.

    Raises:
        ConfigError: on every rank; it cannot be created or written, or another run has locked it.
        OutputLockedError: likewise, and the lock is probably that of a lost process.
    """
    directory = RunDirectory(root.expanduser())
    with ExitStack() as stack:
        with raise_on_all_ranks("opening the output directory"):
            if is_rank0():
                _create(directory.root)
                stack.enter_context(locked_directory(directory.root, _LOCATION))
                for result in (directory.hf, directory.adapter):
                    clear_leftovers(result)
        yield directory


def check_not_stepped(root: Path) -> None:
    """Check that the directory is not that of an sDPO run, or of one of its steps.

    Raises:
        ConfigError: it is.
    """
    for run in (root, root.parent):
        if (run / MANIFEST).is_file() and (run == root or root.name.startswith("step-")):
            message = f"{root} belongs to an sDPO run: {run / MANIFEST}"
            remedy = "name another directory, or resume with the configuration that has sdpo"
            raise ConfigError.at(_LOCATION, message, remedy)


def _create(root: Path) -> None:
    remedy = "name a directory that can be written"
    with ConfigError.on_os_error(_LOCATION, f"{root} cannot be written", remedy):
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".probe"
        probe.write_bytes(b"")
        os.unlink(probe)

"""The directory of a run: what lies where, and that one run at a time has it.

OUTPUT/
  config.yaml      the resolved configuration       checkpoints/   what a run goes on from
  metrics.jsonl    one line per logged step          curves.png     the same as a picture
  hf/              the result, for Transformers      adapter/       the result, for PEFT
  reference/       the reference's log-probabilities, computed before the first step
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.sdpo_steps import MANIFEST
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.world import is_first_rank, raise_on_all_ranks
from megatron_idpo.storage.directories import clear_leftovers
from megatron_idpo.storage.lock import Held, locked

PLACE = "training.output"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a run leaves what."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration as it was understood, defaults included."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """What was logged."""
        return self.root / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The same, drawn."""
        return self.root / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """States to go on from."""
        return self.root / "checkpoints"

    @property
    def hf(self) -> Path:
        """The trained model for Transformers; adapters are merged into it."""
        return self.root / "hf"

    @property
    def adapter(self) -> Path:
        """The trained adapter for PEFT."""
        return self.root / "adapter"

    def write_config(self, text: str) -> None:
        """Write the resolved configuration; one that is there is replaced whole, or stays.

        Raises:
            ConfigError: it cannot be written.
        """
        fresh = self.config.with_name(f".{self.config.name}.incomplete")
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self.config)
        except OSError as error:
            message = f"{self.config} cannot be written: {error.strerror}"
            raise ConfigError.at(PLACE, message, "free some space") from None


@contextmanager
def opened(root: Path) -> Iterator[RunDirectory]:
    """Make a run's directory and hold it while the run lasts. Collective.

    What exports that were killed left in it is deleted.

    The hold is the system's lock on a file, which ends with the process, however that ends.

    Raises:
        ConfigError: on every rank; it cannot be made or written, or another run has it.
    """
    directory = RunDirectory(root.expanduser())
    with ExitStack() as hold:
        with raise_on_all_ranks("opening the output directory"):
            if is_first_rank():
                _make(directory.root)
                _enter(hold, directory.root)
                for result in (directory.hf, directory.adapter):
                    clear_leftovers(result)
        yield directory


def refuse_steps_directory(root: Path) -> None:
    """Refuse the directory of a run of several steps, or one of its steps', for another run.

    Raises:
        ConfigError: it is one.
    """
    for run in (root, root.parent):
        if (run / MANIFEST).is_file() and (run == root or root.name.startswith("step-")):
            message = f"{root} belongs to a run of several steps: {run / MANIFEST}"
            remedy = "name another directory, or go on with the configuration that has sdpo"
            raise ConfigError.at(PLACE, message, remedy)


def _make(root: Path) -> None:
    remedy = "name a directory that can be written"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".probe"
        probe.write_bytes(b"")
        os.unlink(probe)
    except OSError as error:
        raise ConfigError.at(PLACE, f"{root} cannot be written: {error.strerror}", remedy) from None


def _enter(hold: ExitStack, root: Path) -> None:
    """Hold the directory until the stack is unwound."""
    try:
        hold.enter_context(locked(root / ".lock"))
    except Held:
        message = f"{root} is being written by another run"
        raise ConfigError.at(PLACE, message, "wait for it, or name another directory") from None
    except OSError as error:
        message = f"{root} cannot be locked: {error.strerror}"
        raise ConfigError.at(PLACE, message, "name a directory on another file system") from None

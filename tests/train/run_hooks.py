"""What looks on or interferes while a tiny run goes on, on every rank."""

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from megatron_idpo.errors import ConfigError

from .tiny_run import BATCH_PAIRS


@contextmanager
def _after(owner: str, name: str, also: Callable[..., None]) -> Iterator[None]:
    """Whenever a function or method has returned, do something else with its result and arguments.

    Args:
        owner: `module` or `module:Class`, in this package.
        name: of the function there.
        also: called with the result and then the arguments.
    """
    module, _, cls = owner.partition(":")
    holder = importlib.import_module(f"megatron_idpo.{module}")
    holder = getattr(holder, cls) if cls else holder
    ordinary = getattr(holder, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = ordinary(*args, **kwargs)
        also(result, *args, **kwargs)
        return result

    with patch.object(holder, name, both):
        yield


@dataclass(frozen=True)
class Signal:
    """A rank gets a signal while it reports a step, which is heeded at the end of the next one."""

    step: int
    rank: int = 0
    number: int = signal.SIGTERM

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        import torch.distributed as dist

        def also(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.step and dist.get_rank() == self.rank:
                os.kill(os.getpid(), self.number)

        with _after("train.report:Report", "step", also):
            yield


def stop_after(step: int, **fields: Any) -> Signal:
    """A signal so that the run ends, saved, after this step."""
    return Signal(step - 1, **fields)


@dataclass(frozen=True)
class ReadTrained:
    """`logps`: at the end, this rank's layers' reading of the training pairs, (layer, pair)."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        def also(_: None, run: Any, report: Any, left: Any) -> None:
            found["logps"] = read(run)

        with _after("train.loop", "tell_finished", also):
            yield


def read(run: Any) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities of chosen and rejected, by layer and pair; this rank's part of them."""
    from megatron_idpo.data.packing.batches import EvaluationBatches
    from megatron_idpo.plugin.batch_run import run_batch

    policy, said = run.trainer.policy, {}
    for batch in EvaluationBatches(run.pairs.train, run.rows, global_batch_pairs=BATCH_PAIRS):
        for output in run_batch(policy.dpo, policy.trainable.model, batch, None):
            pairs = batch.rows[output.micro_batch].pair_index_P
            for pair, logps_2 in zip(pairs, output.logps_2P.view(-1, 2), strict=True):
                said[output.layer, int(pair)] = logps_2.clone()
    return said


@dataclass(frozen=True)
class Spoil:
    """Fill weights with a number: rows of those whose name in the whole model ends so."""

    name: str
    value: float
    row: int | None = None
    """None is all of it."""

    before_step: int = 0
    """0 is at the start, before the check."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.train.step import Trainer

        ordinary = Trainer.step

        def assembled(run: Any, *args: Any, **kwargs: Any) -> None:
            if self.before_step == 0:
                self._spoil(run.trainer.policy)

        def step(trainer: Any, batch: Any, number: int, **kwargs: Any) -> Any:
            if number == self.before_step:
                self._spoil(trainer.policy)
            return ordinary(trainer, batch, number, **kwargs)

        with _after("train.loop", "assemble", assembled), patch.object(Trainer, "step", step):
            yield

    def _spoil(self, policy: Any) -> None:
        from megatron_idpo.mcore.model.build import global_parameters

        named = dict(global_parameters(policy.chunks))
        if policy.adapters is not None:
            named |= dict(policy.adapters.parameters())
        for name, parameter in named.items():
            if name.endswith(self.name):
                parameter.data[self.row if self.row is not None else slice(None)] = self.value


@dataclass(frozen=True)
class SpoilAfter(Spoil):
    """The same by a step's own update: when it is over, nobody has read the weights yet."""

    step: int = 1

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        def also(_: Any, trainer: Any, batch: Any, number: int, **kwargs: Any) -> None:
            if number == self.step:
                self._spoil(trainer.policy)

        with _after("train.step:Trainer", "step", also):
            yield


@dataclass(frozen=True)
class Break:
    """A rank's report of a step fails, while checkpoints take long to be written."""

    step: int
    save_s: float

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.checkpoint import store as checkpoints

        ordinary = checkpoints.write_chunks

        def slow(*args: Any, **kwargs: Any) -> None:
            time.sleep(self.save_s)
            ordinary(*args, **kwargs)

        def also(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.step:
                raise ConfigError.at("training.output", "is full")

        broken = _after("train.report:Report", "step", also)
        with broken, patch.object(checkpoints, "write_chunks", slow):
            yield


@dataclass(frozen=True)
class NoWeights:
    """Whoever reads a weight of the base model fails the test."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        with patch("megatron_idpo.train.build.load_base", side_effect=AssertionError("read")):
            yield


@dataclass(frozen=True)
class CountSteps:
    """`steps`: the numbers of the steps that were taken."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        found["steps"] = []

        def also(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            found["steps"].append(step)

        with _after("train.report:Report", "step", also):
            yield

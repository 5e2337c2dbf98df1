"""Hooks that observe or disturb a tiny run, on every rank."""

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

_REPORT = "train.logging.report:Report"


@contextmanager
def after_call(owner: str, name: str, call: Callable[..., None]) -> Iterator[None]:
    """Call a function after each call of a function or method of the package.

    Args:
        owner: `module` or `module:Class`, in this package.
        name: of the function there.
        call: receives the result and then the arguments.
    """
    module, _, cls = owner.partition(":")
    holder = importlib.import_module(f"megatron_idpo.{module}")
    holder = getattr(holder, cls) if cls else holder
    original = getattr(holder, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        call(result, *args, **kwargs)
        return result

    with patch.object(holder, name, both):
        yield


@contextmanager
def compiled_ahead(found: dict[str, Any]) -> Iterator[None]:
    """The passes that compile attention on a GPU before the first step run on the CPU as well."""
    import torch

    from megatron_idpo.train import compile_ahead

    with (
        patch.object(compile_ahead, "default_device", lambda: torch.device("cuda")),
        patch.object(torch.cuda, "synchronize"),
    ):
        yield


@dataclass(frozen=True)
class Signal:
    """A rank receives a signal while it reports a step; the run stops at the end of the next."""

    step: int
    rank: int = 0
    number: int = signal.SIGTERM

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        import torch.distributed as dist

        def send(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.step and dist.get_rank() == self.rank:
                os.kill(os.getpid(), self.number)

        with after_call(_REPORT, "step", send):
            yield


@dataclass(frozen=True)
class SignalInEvaluation:
    """This process receives a signal after so many evaluated batches."""

    batch: int

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        batches: list[None] = []

        def send(*_: Any) -> None:
            batches.append(None)
            if len(batches) == self.batch:
                os.kill(os.getpid(), signal.SIGTERM)

        with after_call("train.step:TrainStep", "evaluate", send):
            yield


def stop_after(step: int, **fields: Any) -> Signal:
    """A signal that stops the run, saved, after this step."""
    return Signal(step - 1, **fields)


@dataclass(frozen=True)
class ReadTrained:
    """`logps`: the trained policy's log-probabilities, by layer and pair, of this rank."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        def read(_: None, trainer: Any, report: Any, results: Any) -> None:
            found["logps"] = training_logps(trainer)

        with after_call("train.loop", "report_finished", read):
            yield


def training_logps(trainer: Any) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities of chosen and rejected answer, by layer and training pair, of this rank."""
    from megatron_idpo.data.packing.batches import EvaluationBatches
    from megatron_idpo.plugin.batch_run import run_batch

    policy, logps = trainer.policy, {}
    batches = EvaluationBatches(trainer.pairs.train, trainer.rows, global_batch_pairs=BATCH_PAIRS)
    for batch in batches:
        for output in run_batch(policy.dpo, policy.trainable.model, batch, None):
            pairs = batch.rows[output.micro_batch].pair_index_P
            for pair, logps_2 in zip(pairs, output.logps_2P.view(-1, 2), strict=True):
                logps[output.layer, int(pair)] = logps_2.clone()
    return logps


@dataclass(frozen=True)
class Spoil:
    """Set weights to a value before a step.

    Args:
        name: end of the weights' names in the whole model.
        value: to set.
        row: of the weights; None is all of them.
        before_step: 0 is at the start, before the start check.
    """

    name: str
    value: float
    row: int | None = None
    before_step: int = 0

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.train.step import TrainStep

        original = TrainStep.train

        def at_start(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if self.before_step == 0:
                self._spoil(trainer.policy)

        def train(train_step: Any, batch: Any, step: int, **kwargs: Any) -> Any:
            if step == self.before_step:
                self._spoil(train_step.policy)
            return original(train_step, batch, step, **kwargs)

        with (
            after_call("train.loop", "assemble", at_start),
            patch.object(TrainStep, "train", train),
        ):
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
    """Set weights to a value after a step, as a bad update would."""

    step: int = 1

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        def spoil(_: Any, train_step: Any, batch: Any, step: int, **kwargs: Any) -> None:
            if step == self.step:
                self._spoil(train_step.policy)

        with after_call("train.step:TrainStep", "train", spoil):
            yield


@dataclass(frozen=True)
class Break:
    """The report of a step fails while a checkpoint is being written slowly."""

    step: int
    save_s: float

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.checkpoint import store as checkpoints

        original = checkpoints.write_chunks

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(self.save_s)
            return original(*args, **kwargs)

        def fail(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.step:
                raise ConfigError.at("training.output", "is full")

        with after_call(_REPORT, "step", fail), patch.object(checkpoints, "write_chunks", slow):
            yield


@dataclass(frozen=True)
class NoWeights:
    """Fail the test if weights of the base model are read."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        with patch("megatron_idpo.train.policy.load_base", side_effect=AssertionError("read")):
            yield


@dataclass(frozen=True)
class CountSteps:
    """`steps`: indices of the steps that were taken."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        found["steps"] = []

        def count(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            found["steps"].append(step)

        with after_call(_REPORT, "step", count):
            yield


@dataclass(frozen=True)
class ReadActivities:
    """`activities`: what heartbeats announce in micro-batches and reports; True if timed."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.mcore.watchdog.activity import current_activity

        announced = found["activities"] = []

        def read(*_: Any, **__: Any) -> None:
            activity = current_activity()
            announced.append((str(activity), activity.is_timed))

        with (
            after_call("plugin.batch_run", "progressed", read),
            after_call("train.logging.report:Report", "step", read),
        ):
            yield

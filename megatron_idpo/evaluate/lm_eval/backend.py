"""Where lm-eval is called: a model and a task in, a figure out, and nothing said in between.

Every import of lm-eval is within a function: it is not among this package's own dependencies.
Prompts are plain text without a chat template, as on the leaderboard that the paper's figures
follow.
"""

import importlib.metadata
import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from packaging.version import Version

from megatron_idpo.config.sections import ModelConfig
from megatron_idpo.errors import CheckpointError, ConfigError, DataError
from megatron_idpo.evaluate.lm_eval.items import Items
from megatron_idpo.evaluate.lm_eval.tasks import (
    H4,
    H4Task,
    format_examples,
    parts_of,
    result_name,
    spec,
)
from megatron_idpo.evaluate.models import Subject

OLDEST = "0.4.13"
"""An older lm-eval would look for local items on the hub."""

INSTALL = "pip install 'megatron-idpo[eval]'"


@dataclass(frozen=True, slots=True)
class Measured:
    """One task's figure, as a share of 1."""

    metric: str
    value: float
    stderr: float | None
    """None for a single item."""

    items: int
    few_shot: int
    examples: str
    """Where the prompt's examples come from."""

    cut: int
    """Prompts with an answer that were longer than the model's context: their beginning, that is
    examples, was left out."""


def lm_eval_version() -> str:
    """The version that is installed, without importing it.

    Raises:
        ConfigError: there is none, or it is too old.
    """
    try:
        found = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError.at("lm-eval", "is not installed", INSTALL) from None
    if Version(found) < Version(OLDEST):
        raise ConfigError.at("lm-eval", f"is {found}, at least {OLDEST} is needed", INSTALL)
    return found


class LmEval:
    """lm-eval's tasks and one model."""

    def __init__(self, model: ModelConfig, subject: Subject, batch_size: int) -> None:
        """Load the model; onto the first GPU where there is one.

        Raises:
            CheckpointError: Transformers or PEFT cannot load it.
        """
        import torch

        self._path = subject.path
        dtype = str(model.torch_dtype()).removeprefix("torch.")
        adapter = {} if subject.adapter is None else {"peft": str(subject.adapter)}
        with _quiet():
            from lm_eval.models.huggingface import HFLM

            try:
                self._model = HFLM(
                    subject.path,
                    tokenizer=model.tokenizer,
                    dtype=dtype,
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    batch_size=batch_size,
                    **adapter,
                )
            # The libraries raise whatever the files at hand lead to, or PEFT's not being there.
            except Exception as error:
                message = f"Transformers cannot load it: {type(error).__name__}: {error}"
                remedy = "name a complete Hugging Face model, with its tokenizer"
                raise CheckpointError.at(subject.path, message, remedy) from error

    def measure(self, task: H4Task, items: Items | None, limit: int | None) -> Measured:
        """Ask a task's items.

        Args:
            task: one of `H4`.
            items: local ones; None takes the hub's.
            limit: only so many, the first ones; of MMLU in each subject.

        Raises:
            CheckpointError: the model's outputs are no numbers.
            ConfigError: the hub does not give the items; the GPU's memory is too small.
            DataError: local ones cannot be asked.
        """
        import torch

        with _quiet() as listener:
            from lm_eval.evaluator import evaluate

            loaded = _load(task, items)
            # One resample is not one for these metrics: their errors have a formula.
            settings = {"limit": limit, "log_samples": False, "bootstrap_iters": 1}
            try:
                found = evaluate(lm=self._model, task_dict=loaded, **settings)
            except torch.OutOfMemoryError:
                message = f"is {self._model.batch_size}: {task.title} does not fit into memory"
                raise ConfigError.at("h4.batch_size", message, "set a smaller one") from None
        figures = found["results"][result_name(task, items)]
        value, stderr = (figures.get(f"{task.metric}{end},none") for end in ("", "_stderr"))
        if not math.isfinite(value):
            message = f"gives {task.title} no figure ({value}): its outputs are no numbers"
            remedy = "see whether it is whole, or set model.dtype to fp32"
            raise CheckpointError.at(self._path, message, remedy)
        return Measured(
            metric=task.shown,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, float) else None,
            items=int(figures["sample_len"]),
            few_shot=task.few_shot,
            examples=format_examples(task, items),
            cut=listener.cut,
        )


def task_manager() -> Any:
    """lm-eval's `TaskManager` with the four tasks; its other definitions, thousands, are unread."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / known.folder) for known in H4.values()]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _load(task: H4Task, items: Items | None) -> Any:
    """lm-eval's tasks, ready to be asked."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    manager = task_manager()
    if items is not None:
        _check_subjects(parts_of(task, items), manager, items)
    try:
        loaded = manager.load([spec(task, items)])
    except Exception as error:  # of the hub and of four network libraries
        if items is not None:
            raise
        message = f"is null, and the hub does not give {task.name}: {type(error).__name__}: {error}"
        remedy = "name a directory with the items, or see to the network"
        raise ConfigError.at("h4.items", message, remedy) from error
    for part in loaded["tasks"].values():
        part.set_config("num_fewshot", task.few_shot)
        part.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _check_subjects(names: list[str], manager: Any, items: Items) -> None:
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        subjects = ", ".join(name.removeprefix("mmlu_") for name in unknown)
        remedy = "write the hub's names, such as abstract_algebra"
        raise DataError.at(str(items.file), f"lm-eval knows no subject {subjects}", remedy)


# ---- quiet ----------------------------------------------------------------------------------


class _Listener(logging.Handler):
    """Counts prompts that were cut; of all else only errors are passed on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Combined length of context"):
            self.cut += 1
        elif record.levelno >= logging.ERROR:
            print(f"lm-eval: {text}", file=sys.stderr)


class _WithoutBars(io.TextIOBase):
    """A stream without progress bars, which begin with a carriage return, for files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text.strip() and not text.startswith("\r"):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def _quiet() -> Iterator[_Listener]:
    """lm-eval's log goes to a listener; its bars are seen at a terminal only."""
    logger, listener = logging.getLogger("lm_eval"), _Listener()
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(_WithoutBars(sys.stderr))
    try:
        with bars:
            yield listener
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])

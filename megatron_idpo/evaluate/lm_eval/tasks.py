"""The four tasks of H4, and lm-eval's evaluation of one model on them.

Prompts, choices and metrics are lm-eval's own task files; the number of examples is that of the
sDPO paper's table. Prompts are plain text without a chat template, as on the leaderboard that the
paper's values follow. With local items only the data of a task is replaced, so that nothing is
looked up on the hub.

lm-eval is not a dependency of this package: it is imported within functions.
"""

import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron_idpo.config.data import ModelConfig
from megatron_idpo.errors import CheckpointError, ConfigError, DataError, library_reason
from megatron_idpo.evaluate.lm_eval.items import Items, Record
from megatron_idpo.evaluate.models import EvalModel

MIN_VERSION = "0.4.13"
"""Older versions look for local items on the hub."""

# The requirement of the extra `eval`: the extra itself can only be named once it is on PyPI.
INSTALL = "pip install 'lm-eval[hf]>=0.4.13,<0.5'"
SAME_FILE = "the items themselves, without the one asked"
FIXED = "fixed, part of the task"
_GROUP = "local"


@dataclass(frozen=True, slots=True)
class H4Task:
    """One task."""

    name: str
    """In `h4.tasks` and in lm-eval."""

    title: str
    """In tables."""

    metric: str
    """In lm-eval."""

    shown: str
    """The metric in tables."""

    few_shot: int
    """Examples in the prompt."""

    folder: str
    """Of the task file, in lm-eval's `tasks/`."""

    asked: str
    """Split whose items are asked."""

    examples: str | None
    """Split of the examples; None: all prompts have the same examples."""


_TASKS = (
    H4Task("arc_challenge", "ARC", "acc_norm", "acc_norm", 25, "arc", "test", "train"),
    H4Task(
        "hellaswag", "HellaSwag", "acc_norm", "acc_norm", 10, "hellaswag", "validation", "train"
    ),
    H4Task("mmlu", "MMLU", "acc", "acc", 5, "mmlu/default", "test", "dev"),
    H4Task("truthfulqa_mc2", "TruthfulQA", "acc", "mc2", 0, "truthfulqa", "validation", None),
)
H4 = {task.name: task for task in _TASKS}
"""By name, in the order of the paper's table. mc2 is the share of probability on true answers."""


class _CutCounter(logging.Filter):
    """Counts lm-eval's warnings of prompts that were cut; passes errors only."""

    num_cut = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        self.num_cut += record.getMessage().startswith("Combined length of context")
        return record.levelno >= logging.ERROR


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model's value in one task, as a share of 1."""

    metric: str
    value: float
    stderr: float | None
    """None for a single item."""

    items: int
    few_shot: int
    examples: str
    """Origin of the examples."""

    cut: int
    """Prompts that were longer than the model's context: they lost their first examples."""

    files: Mapping[str, str]
    """sha256 of the local files by name; empty for items of the hub."""


def lm_eval_version() -> str:
    """The installed version, without importing it.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    try:
        version = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError.at("lm-eval", "is not installed", INSTALL) from None
    if Version(version) < Version(MIN_VERSION):
        raise ConfigError.at("lm-eval", f"is {version}, needs at least {MIN_VERSION}", INSTALL)
    return version


class LmEvalModel:
    """A model loaded by lm-eval, on the first GPU if there is one."""

    def __init__(self, config: ModelConfig, model: EvalModel, batch_size: int) -> None:
        """Load the model.

        Raises:
            CheckpointError: Transformers or PEFT cannot load it, or exported weights were changed.
        """
        # Imports transformers.
        from megatron_idpo.evaluate.hf_model import check_weights, hide_loading_bar

        for directory in filter(None, (Path(model.path), model.adapter)):
            check_weights(directory)
        import torch
        from lm_eval.models.huggingface import HFLM

        self._path, self._cut = model.path, _CutCounter()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Its level must let warnings pass, or the filter does not see them.
        model_logger = logging.getLogger(HFLM.__module__)
        model_logger.setLevel(logging.WARNING)
        model_logger.filters = [self._cut]
        try:
            with hide_loading_bar():
                self._model = HFLM(
                    model.path,
                    tokenizer=config.tokenizer,
                    dtype=str(config.torch_dtype()).removeprefix("torch."),
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    batch_size=batch_size,
                    trust_remote_code=False,
                    peft=None if model.adapter is None else str(model.adapter),
                )
        # Depending on the files, the libraries raise almost any type of exception.
        except Exception as error:
            message = f"Transformers cannot load it: {library_reason(error)}"
            remedy = (
                "name a complete Hugging Face model, with its tokenizer; a torch_dist checkpoint "
                "must be converted: megatron-idpo convert megatron-to-hf"
            )
            raise CheckpointError.at(model.path, message, remedy) from error

    def evaluate(self, task: H4Task, items: Items | None, limit: int | None) -> TaskResult:
        """Evaluate one task.

        Args:
            task: of `H4`.
            items: local items; None takes the hub's.
            limit: only the first so many items; MMLU: of each subject.

        Raises:
            CheckpointError: the model's outputs are NaN or inf.
            ConfigError: the hub cannot be reached; the GPU's memory is too small.
            DataError: an unknown subject of MMLU.
        """
        import torch
        from lm_eval.evaluator import simple_evaluate

        manager = task_manager()
        if items is not None:
            _check_subjects(task, items, manager)
        self._cut.num_cut = 0
        try:
            output = simple_evaluate(
                self._model,
                tasks=task_specs(task, items),
                num_fewshot=task.few_shot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1,  # these metrics have closed-form standard errors
                task_manager=manager,
            )
        except torch.OutOfMemoryError:
            message = f"{task.title} does not fit into memory"
            raise ConfigError.at("h4.batch_size", message, "set a smaller one") from None
        except OSError as error:  # of the hub's libraries
            if items is not None:
                raise
            reason = f"{type(error).__name__}: {error}"
            message = f"is null, and the hub does not provide {task.name}: {reason}"
            remedy = "name a directory with the items, or check the network"
            raise ConfigError.at("h4.items", message, remedy) from error
        names = [task.name] if items is None else list(_parts(task, items))
        value, stderr, num_items = _aggregate(task, [output["results"][name] for name in names])
        if not math.isfinite(value):
            message = f"has no value in {task.title} ({value}): its outputs are NaN or inf"
            remedy = "check that it is complete, or set model.dtype to fp32"
            raise CheckpointError.at(self._path, message, remedy)
        examples = FIXED if task.examples is None else f"split {task.examples}"
        if task.examples is not None and items is not None and items.examples is None:
            examples = SAME_FILE
        files, cut = {} if items is None else dict(items.digests), self._cut.num_cut
        shots = task.few_shot
        return TaskResult(task.shown, value, stderr, num_items, shots, examples, cut, files)


def task_manager() -> Any:
    """lm-eval's `TaskManager` with the task files of H4 only; it has thousands of others."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / task.folder) for task in _TASKS]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def task_specs(task: H4Task, items: Items | None) -> list[Any]:
    """The task for `simple_evaluate`: its name, or a group of tasks whose data is replaced.

    Only within a group does a dictionary that names a task inherit from the task file.

    Raises:
        DataError: there are too few items to take the examples from.
    """
    if items is None:
        return [task.name]
    members = [
        {"task": name, **_data(task, items, *part)} for name, part in _parts(task, items).items()
    ]
    return [{"group": _GROUP, "task": members}]


def _parts(
    task: H4Task, items: Items
) -> dict[str, tuple[Sequence[Record], Sequence[Record] | None]]:
    """lm-eval's task -> items and examples; MMLU is one task per subject."""
    if task.name != "mmlu":
        return {task.name: (items.asked, items.examples)}
    examples = None if items.examples is None else _by_subject(items.examples)
    return {
        f"mmlu_{subject}": (rows, None if examples is None else examples.get(subject, []))
        for subject, rows in _by_subject(items.asked).items()
    }


def _by_subject(rows: Sequence[Record]) -> dict[str, list[Record]]:
    subjects = sorted({row["subject"] for row in rows})
    return {subject: [row for row in rows if row["subject"] == subject] for subject in subjects}


def _data(
    task: H4Task, items: Items, asked: Sequence[Record], examples: Sequence[Record] | None
) -> dict[str, Any]:
    """What replaces the data of a task file.

    lm-eval excludes an item from its own examples only where `fewshot_split` and `test_split` have
    the same name; with `validation_split` instead of `test_split` it would show the answer.
    """
    _check_examples(task, items, asked, examples)
    splits = {task.asked: asked}
    if task.examples is not None and examples is not None:
        splits[task.examples] = examples
    data = {"custom_dataset": partial(_dataset, splits)}
    if task.examples is None or examples is not None:
        return data
    no_splits = {"training_split": None, "validation_split": None}
    return {**data, **no_splits, "test_split": task.asked, "fewshot_split": task.asked}


def _dataset(splits: Mapping[str, Sequence[Record]], **_: Any) -> Any:
    """The data of a task; lm-eval calls it, because it would copy a data set in the dictionary."""
    import datasets

    rows = {name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()}
    return datasets.DatasetDict(rows)


def _check_examples(
    task: H4Task, items: Items, asked: Sequence[Record], examples: Sequence[Record] | None
) -> None:
    if not task.few_shot:
        return
    pool = asked if examples is None else examples
    distinct = len({repr(row) for row in pool})
    # One more where lm-eval excludes the item that is asked; for HellaSwag it always does.
    needed = task.few_shot + (examples is None or task.name == "hellaswag")
    if distinct < needed:
        of = f" of {asked[0]['subject']}" if task.name == "mmlu" else ""
        message = f"has {distinct} distinct items{of} to take {task.few_shot} examples from"
        remedy = f"provide at least {needed} of them, or leave {task.name} out of h4.tasks"
        raise DataError.at(str(items.file.parent / list(items.digests)[-1]), message, remedy)


def _check_subjects(task: H4Task, items: Items, manager: Any) -> None:
    unknown = sorted(set(_parts(task, items)) - set(manager.all_tasks))
    if unknown:
        subjects = ", ".join(name.removeprefix("mmlu_") for name in unknown)
        remedy = "use the hub's names, such as abstract_algebra"
        raise DataError.at(str(items.file), f"lm-eval has no subject {subjects}", remedy)


def _aggregate(
    task: H4Task, results: Sequence[Mapping[str, Any]]
) -> tuple[float, float | None, int]:
    """Value, standard error and items of a task from its parts, weighted by their items."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    sizes = [int(result["sample_len"]) for result in results]
    values = [result[f"{task.metric},none"] for result in results]
    stderrs = [result[f"{task.metric}_stderr,none"] for result in results]
    is_known = all(isinstance(stderr, float) for stderr in stderrs)
    return (
        float(aggregate_subtask_metrics(values, sizes)),
        float(pooled_sample_stderr(stderrs, sizes)) if is_known else None,
        sum(sizes),
    )

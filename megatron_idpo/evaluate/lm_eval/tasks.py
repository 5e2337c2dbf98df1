"""The four tasks of H4 as lm-eval has them, with as many examples as the sDPO paper's table.

Prompts, choices and metrics are those of lm-eval's own definitions. Where items are local, only
what the data are is replaced; so nothing is looked up on the hub. Here are plain values alone:
lm-eval is imported in `h4_lm_eval.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.lm_eval.items import Items, Record

if TYPE_CHECKING:
    import datasets

Spec = dict[str, Any]
"""A task or a group of them in lm-eval's words."""

SAME_FILE = "the items themselves, without the one asked"
FIXED = "fixed, part of the task"


@dataclass(frozen=True, slots=True)
class H4Task:
    """One task."""

    name: str
    """Ours in `h4.tasks`, and lm-eval's."""

    title: str
    """In tables."""

    metric: str
    """As lm-eval calls it."""

    shown: str
    """The same for people."""

    few_shot: int
    """Examples in the prompt, before the question."""

    folder: str
    """Of lm-eval's definition, in its `tasks/`."""

    asked: str
    """The split whose items are asked."""

    examples: str | None
    """The split that examples come from; None: every prompt has the same ones."""


H4 = {
    task.name: task
    for task in (
        H4Task("arc_challenge", "ARC", "acc_norm", "acc_norm", 25, "arc", "test", "train"),
        H4Task(
            "hellaswag", "HellaSwag", "acc_norm", "acc_norm", 10, "hellaswag", "validation", "train"
        ),
        H4Task("mmlu", "MMLU", "acc", "acc", 5, "mmlu/default", "test", "dev"),
        H4Task("truthfulqa_mc2", "TruthfulQA", "acc", "mc2", 0, "truthfulqa", "validation", None),
    )
}
"""By name, in the order of the paper's table. mc2 is the share of probability that the true
answers have."""


_LOCAL = "local"
"""The group around a local task's group: lm-eval gives what stands in a group's own definition to
its tasks as well, where an aggregation is unknown, but not what stands in a group within it."""

_GROUP = "h4_"
"""Before a local group's name, which would otherwise be one that lm-eval knows."""


def result_name(task: H4Task, items: Items | None) -> str:
    """What lm-eval calls a task's figures."""
    return task.name if items is None else f"{_LOCAL}::{_GROUP}{task.name}"


def spec(task: H4Task, items: Items | None) -> str | Spec:
    """A task for lm-eval's `TaskManager.load`.

    Args:
        task: one of `H4`.
        items: where they are local: a group, whose members are lm-eval's own tasks with other data;
            None takes lm-eval's own.

    Raises:
        DataError: too few items to give as many examples.
    """
    if items is None:
        return task.name
    members = [
        {"task": name, **_data(task, items, asked, examples)}
        for name, asked, examples in _parts(task, items)
    ]
    aggregate = [{"metric": task.metric, "weight_by_size": True}]
    group = {"group": _GROUP + task.name, "task": members, "aggregate_metric_list": aggregate}
    return {"group": _LOCAL, "task": [group]}


def parts_of(task: H4Task, items: Items) -> list[str]:
    """The names of lm-eval's tasks that local items belong to."""
    return [name for name, _, _ in _parts(task, items)]


def format_examples(task: H4Task, items: Items | None) -> str:
    """Where a prompt's examples come from."""
    if task.examples is None:
        return FIXED
    if items is not None and items.examples is None:
        return SAME_FILE
    return f"split {task.examples}"


def subjects_of(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """MMLU's items by subject, each in its order."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row["subject"], []).append(row)
    return dict(sorted(found.items()))


def _parts(
    task: H4Task, items: Items
) -> list[tuple[str, Sequence[Record], Sequence[Record] | None]]:
    """lm-eval's name of each part, its items and its examples; MMLU is one task a subject."""
    if task.name != "mmlu":
        return [(task.name, items.asked, items.examples)]
    examples = None if items.examples is None else subjects_of(items.examples)
    return [
        (f"mmlu_{subject}", rows, None if examples is None else examples.get(subject, []))
        for subject, rows in subjects_of(items.asked).items()
    ]


def _data(
    task: H4Task, items: Items, asked: Sequence[Record], examples: Sequence[Record] | None
) -> Spec:
    """What is replaced in lm-eval's definition.

    lm-eval keeps an item out of its own examples only where `fewshot_split` and `test_split` are
    the same name: with `validation_split` in the second one's place it would show the answer.

    Raises:
        DataError: too few items to give as many examples.
    """
    _check_examples(task, items, asked, examples)
    splits = {task.asked: asked}
    if task.examples is None:
        return {"custom_dataset": _maker(splits)}
    if examples is not None:
        return {"custom_dataset": _maker({**splits, task.examples: examples})}
    alone = {"training_split": None, "validation_split": None}
    own = {"test_split": task.asked, "fewshot_split": task.asked}
    return {"custom_dataset": _maker(splits), **alone, **own}


def _check_examples(
    task: H4Task, items: Items, asked: Sequence[Record], examples: Sequence[Record] | None
) -> None:
    if not task.few_shot:
        return
    of = f" of {asked[0]['subject']}" if task.name == "mmlu" else ""
    pool = asked if examples is None else examples
    different = len({repr(row) for row in pool})
    # One more where lm-eval leaves out the item itself, which it does for HellaSwag in any case.
    needed = task.few_shot + (examples is None or task.name == "hellaswag")
    if different < needed:
        message = f"there are {different} different items{of} to take {task.few_shot} examples from"
        remedy = f"give at least {needed} of them, or leave {task.name} out of h4.tasks"
        raise DataError.at(str(items.file.parent / list(items.digests)[-1]), message, remedy)


def _maker(splits: Mapping[str, Sequence[Record]]) -> "Callable[..., datasets.DatasetDict]":
    """What lm-eval calls for the data; a closure, which it does not copy."""

    def make(**_: Any) -> "datasets.DatasetDict":
        import datasets

        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()}
        )

    return make

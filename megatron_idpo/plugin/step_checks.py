"""Checks of a step: the number of pairs, and that all ranks read the same micro-batches.

The number of pairs that the losses are averaged over is the script's; a wrong one scales the
gradient. And a tap's gradient flows into the graph of the micro-batch that its stage has read at
this position. megatron-core sees neither.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_idpo.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What one rank knows about a step."""

    problems: list[Problem]
    pairs: int
    """That it adds to the number over all ranks."""

    stated_pairs: list[int]
    """The values of `PreferenceBatch.global_pairs`."""

    batch_groups: Sequence[tuple[int, ...]] = ()
    """`ModelGroups.batch_groups`."""

    calls: list[list[int]]
    """By chunk, in the order of the calls: `Targets.digest`s."""


def check_stated_pairs(
    stated: Collection[int], own_pairs: int, *, has_all_pairs: bool
) -> list[Problem]:
    """What a rank with the final layer can see of a wrong number of pairs, without a collective.

    Args:
        stated: the values of `PreferenceBatch.global_pairs` in one step.
        own_pairs: of the step on this data-parallel rank.
        has_all_pairs: whether it is the only one.
    """
    is_possible = len(stated) <= 1 and all(
        own_pairs == pairs if has_all_pairs else own_pairs <= pairs for pairs in stated
    )
    if is_possible:
        return []
    return [_wrong_pairs(stated, own_pairs, "" if has_all_pairs else " on one rank alone")]


def check_over_ranks(views: Sequence[StepView]) -> list[Problem]:
    """The problems of all ranks, and those that no single rank sees; the same on every rank.

    Args:
        views: of all ranks of the model.
    """
    problems = list(dict.fromkeys(problem for view in views for problem in view.problems))
    # Not among the consequences of other problems: a rank that lacks outputs lacks pairs, too.
    if problems or (problems := _check_same_batches(views)):
        return problems
    stated = {pairs for view in views for pairs in view.stated_pairs}
    num_pairs = sum(view.pairs for view in views)
    if not stated:
        message = "recorded no output since it was attached"
        remedy = (
            "merge its model_kwargs into the model's call; if several models share a "
            "TransformerConfig, set finalize_model_grads_func to the one of the model that runs"
        )
        return [Problem("AttachedDpo.finalize_model_grads", message, remedy)]
    return [_wrong_pairs(stated, num_pairs)] if stated != {num_pairs} else []


def _wrong_pairs(stated: Collection[int], num_pairs: int, where: str = "") -> Problem:
    numbers = " and ".join(str(pairs) for pairs in sorted(stated))
    message = f"is {numbers}, but the step had {num_pairs} pairs{where}"
    remedy = "count the pairs of all micro-batches of all data-parallel ranks"
    return Problem("PreferenceBatch.global_pairs", message, remedy)


def _check_same_batches(views: Sequence[StepView]) -> list[Problem]:
    """Chunks that must read the same micro-batches in the same order, and did not."""
    calls_by_group: dict[tuple[int, ...], list[list[int]]] = {}
    for view in views:
        # A chunk without taps need not be called with a batch.
        calls = [of_chunk for of_chunk in view.calls if of_chunk]
        for group in view.batch_groups:
            calls_by_group.setdefault(group, []).extend(calls)
    for chunks in calls_by_group.values():
        for of_chunk in chunks[1:]:
            if of_chunk == chunks[0]:
                continue
            pairs = zip(of_chunk, chunks[0], strict=False)
            at = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
            which = "one got more of them" if at is None else f"first at index {at} of the step"
            message = f"ranks that need the same micro-batches got different ones, {which}"
            remedy = (
                "give all pipeline stages, tensor- and context-parallel ranks the same "
                "micro-batches in the same order, and every chunk its own iterator over them"
            )
            return [Problem("data_iterator", message, remedy)]
    return []
